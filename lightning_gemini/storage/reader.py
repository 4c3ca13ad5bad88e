"""A checkpoint back into the arenas of a node, bit for bit: for a job that goes on with the same ranks on the same number of nodes.

Seam: `fill(folder, places, descriptors) -> step`. Each rank's payload is made anew: its head from `rank-<r>.state`, the bytes of its
segments from the boxes in the data files, which are read once for all ranks of the node. Then every block is verified against the
checksums that the rank made when it captured them, and only then the slots are committed. Ranks go on from there as after any other
recovery.

Failure: `CorruptSnapshot` or `ValueError` that names what is missing or differs, `OSError`; no slot is committed.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch

from lightning_gemini.snapshot import blocks, manifest
from lightning_gemini.snapshot.manifest import Segment
from lightning_gemini.snapshot.slots import CorruptSnapshot, SlotFile
from lightning_gemini.state.raw import as_bytes
from lightning_gemini.storage import catalog
from lightning_gemini.storage.files import Folder
from lightning_gemini.storage.gather import Name
from lightning_gemini.storage.layout import Box, Part, RankState, Summary, decode, part_file, rank_file
from lightning_gemini.storage.messages import Place

_BATCH = 64 << 20
"""Bytes asked for at a time: object stores answer many ranges at once faster than one after the other."""


class _Target:
    """The slot of one rank while it is filled."""

    def __init__(self, file: SlotFile, state: RankState) -> None:
        self.file, self.state = file, state
        self.trailer = blocks.Trailer.decode(state.trailer)
        need = max(state.capacity, blocks.size_of_slot(state.length, self.trailer.travel, self.trailer.chunk))
        if file.capacity < need:
            file.allocate(need)
        self.place = file.begin()
        self.put(0, state.head)

    def put(self, at: int, data: bytes | memoryview) -> None:
        with self.file.payload(self.place) as view:
            view[at : at + len(data)] = data

    def verify(self) -> None:
        with self.file.payload(self.place) as view:
            for block, expected in zip(self.trailer.blocks(self.state.length), self.trailer.digests, strict=True):
                with view[block.start : block.start + block.size] as part:
                    if blocks.digest(part) != expected:
                        raise CorruptSnapshot(f"rank {self.state.rank}: the bytes from {block.start} on differ from what was captured")

    def commit(self) -> None:
        state = self.state
        blocks.seal(self.file, self.place, step=state.step, kind=state.kind, length=state.length, trailer=self.trailer)


class _Wish(NamedTuple):
    """A range of a box, and where it goes."""

    segment: Segment
    target: _Target
    at: int


def fill(folder: Folder, places: list[Place], descriptors: list[int]) -> int:
    """Fill the arenas of `places` and commit them; returns the step. `descriptors`: all arenas that the process was started with."""
    about = catalog.summary(folder.url)
    files = [SlotFile(descriptors[place.arena]) for place in places]
    try:
        targets = [_Target(file, _state(folder, place.rank, about)) for file, place in zip(files, places, strict=True)]
        wishes = _wishes(targets)
        for box, data in _read(folder, _wanted(folder, about, wishes)):
            for wish in wishes[box.name, box.shard]:
                wish.target.put(wish.at, data[wish.segment.start : wish.segment.start + wish.segment.length])
        for target in targets:
            target.verify()
        for target in targets:
            target.commit()
    finally:
        for file in files:
            file.close()
    return about.step


def _state(folder: Folder, rank: int, about: Summary) -> RankState:
    name = rank_file(rank)
    if not 0 <= rank < about.world:
        raise ValueError(f"{folder.url} is of {about.world} ranks: rank {rank} must load it through DCP")
    return decode(folder.read(name), RankState, name)


def _wishes(targets: list[_Target]) -> dict[Name, list[_Wish]]:
    wishes: defaultdict[Name, list[_Wish]] = defaultdict(list)
    for target in targets:
        found, position = manifest.decode(target.state.head)
        for segment in found.segments:
            if segment.length:
                wishes[segment.name, segment.shard].append(_Wish(segment, target, position))
            position += segment.length
    return wishes


def _wanted(folder: Folder, about: Summary, wishes: dict[Name, list[_Wish]]) -> list[Box]:
    """The boxes that have something for us, in the order in which they lie in their files."""
    found: dict[Name, Box] = {}
    for node in range(about.nodes):
        name = part_file(node)
        for box in decode(folder.read(name), Part, name).boxes:
            if (box.name, box.shard) in wishes:
                found.setdefault((box.name, box.shard), box)
    for key in wishes.keys() - found.keys():
        raise ValueError(f"{folder.url} has no bytes of {key[0]}, shard {key[1]!r}")
    return sorted(found.values(), key=lambda box: (box.file, box.start))


def _read(folder: Folder, boxes: list[Box]) -> Iterator[tuple[Box, memoryview]]:
    batch: list[Box] = []
    for index, box in enumerate(boxes):
        batch.append(box)
        if index + 1 == len(boxes) or sum(box.length for box in batch) >= _BATCH:
            for box, data in zip(batch, folder.read_ranges([(box.file, box.start, box.length) for box in batch]), strict=True):
                yield box, _tensor_bytes(data)
            batch = []


def _tensor_bytes(data: bytes) -> memoryview:
    tensor = torch.load(io.BytesIO(data), weights_only=True)
    return memoryview(as_bytes(tensor).numpy().data)
