"""Which bytes a rank writes into its snapshot, and which of them must travel to peers. Pure, from the catalogue and the layout of the job.

Each node keeps all bytes that its ranks hold, once: local ranks that hold the same bytes write an equal share each, cut across tensors, so
that the work is divided evenly whatever the sizes. Bytes that ranks of `copies` nodes hold anyway are in the memory of that many nodes
already: they do not travel (DDP, HSDP across nodes). What fewer nodes hold does (FSDP2), to the peers of the node's placement group.

A rank's *twins* hold the same share of the same bytes on their nodes. What does not travel can be fetched from them, so it must be the same
for one set of twins; the bytes of smaller sets (a layer that is laid out in another way) travel instead.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import torch

from lightning_gemini.snapshot.manifest import Segment
from lightning_gemini.state.catalogue import Entry, Holders, bytes_of, segment


class Layout(NamedTuple):
    """Ranks on nodes: node i has the ranks i * per_node and the next ones."""

    rank: int
    world: int
    per_node: int
    copies: int
    """Nodes whose memory shall hold each byte."""

    def node(self, rank: int) -> int:
        """Index of a rank's node."""
        return rank // self.per_node

    def here(self, ranks: Holders) -> tuple[int, ...]:
        """Those of this rank's node."""
        first = self.node(self.rank) * self.per_node
        return tuple(rank for rank in range(first, first + self.per_node) if rank in ranks)

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return self.world // self.per_node


@dataclass(frozen=True, slots=True)
class Owned:
    """What a rank writes: travelling segments first."""

    parts: list[tuple[Segment, torch.Tensor]]
    travelling: int = 0
    """How many of the first parts travel."""
    key: str = ""
    """Equal for ranks whose other parts are the same."""
    twins: tuple[int, ...] = ()
    """Those ranks, this one among them."""
    donors: tuple[int, ...] = ()
    """Other ranks of the node that hold, live, all that this rank holds, and maybe more: each of them can write this in its place."""

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors, in order."""
        return [tensor for _, tensor in self.parts]


def owned(entries: list[Entry], layout: Layout) -> Owned:
    """The share of `layout.rank` in its node's snapshot."""
    groups = _by_holders(entries, layout.rank)
    twins = {holders: _twins(holders, layout) for holders in groups}
    sizes: Counter[tuple[int, ...]] = Counter()
    for holders, group in groups.items():
        if len(twins[holders]) >= layout.copies:
            sizes[twins[holders]] += sum(map(bytes_of, group))
    chosen = max(sizes, key=lambda ranks: (sizes[ranks], ranks)) if sizes and layout.nodes > 1 else None
    travelling: list[tuple[Segment, torch.Tensor]] = []
    staying: list[tuple[Segment, torch.Tensor]] = []
    for holders, group in groups.items():
        share = _share(group, layout.here(holders), layout.rank)
        (staying if layout.nodes == 1 or twins[holders] == chosen else travelling).extend(share)
    key = hashlib.blake2b(msgspec.msgpack.encode([part for part, _ in staying]), digest_size=8).hexdigest() if staying else ""
    return Owned(travelling + staying, len(travelling), key, chosen or (layout.rank,), _donors(groups, layout))


def sharers(entries: list[Entry], layout: Layout) -> list[int]:
    """Ranks of this rank's node that hold some of the same bytes, this one among them: their snapshots together have all of its state."""
    return sorted({layout.rank, *(rank for holders in {entry.holders for entry in entries} for rank in layout.here(holders))})


def _donors(holders: Collection[Holders], layout: Layout) -> tuple[int, ...]:
    here = layout.here(range(layout.world)) if holders else ()
    return tuple(rank for rank in here if rank != layout.rank and all(rank in ranks for ranks in holders))


def _by_holders(entries: list[Entry], rank: int) -> dict[Holders, list[Entry]]:
    """What `rank` holds; another one, that writes in its place, has entries of its own too."""
    groups: defaultdict[Holders, list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[entry.holders].append(entry)
    return {holders: group for holders, group in groups.items() if rank in holders}


def _twins(holders: Holders, layout: Layout) -> tuple[int, ...]:
    """Ranks that write the same share of these bytes, one per node; just this rank where nodes share them out differently."""
    nodes: defaultdict[int, list[int]] = defaultdict(list)
    for rank in holders:
        nodes[layout.node(rank)].append(rank)
    mine = nodes[layout.node(layout.rank)]
    if any(len(ranks) != len(mine) for ranks in nodes.values()):
        return (layout.rank,)
    return tuple(ranks[mine.index(layout.rank)] for ranks in nodes.values())


def _share(entries: list[Entry], sharers: tuple[int, ...], rank: int) -> list[tuple[Segment, torch.Tensor]]:
    """The range of these entries' concatenated bytes that `rank`, one of the sharers, writes."""
    total, position = sum(map(bytes_of, entries)), 0
    place, count = sharers.index(rank), len(sharers)
    first, last = total * place // count, total * (place + 1) // count
    found = []
    for entry in entries:
        length = bytes_of(entry)
        low, high = max(first, position), min(last, position + length)
        if low < high or (length == 0 and place == 0):
            found.append((segment(entry, low - position if length else 0, max(0, high - low)), entry.tensor))
        position += length
    return found
