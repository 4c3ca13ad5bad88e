"""One arena that is filled from other copies: what is known of it, which blocks are left, and who may still bring them.

Seam: `offer` and `refuse` take what the sources say; `take`, `arrived` and `lost` move blocks between waiting, under way and done;
`prepare` and `finish` touch the memory. Guarded by the caller's lock, except `prepare` and `finish`, which one thread calls once (see
`fetching`).

States: unknown -> claimed (the first travelling copy says how large all is) -> ready (memory is there) -> every block done -> committed.
The travelling part comes from copies of the rank's own snapshot, the shared part from twins: ranks with the same manifest key, whose
checksums must be the same.

Failure: `Impossible`, when some block has no source left; names rank, step, byte, and what was wrong with each source.
"""

from __future__ import annotations

import collections
import os
from dataclasses import dataclass
from typing import NamedTuple

from lightning_gemini.memory_size import available_memory
from lightning_gemini.replication.shelf import read_manifest
from lightning_gemini.replication.sources import Found
from lightning_gemini.snapshot import blocks
from lightning_gemini.snapshot.slots import CorruptSnapshot, SlotFile

_ATTEMPTS = 2
"""From one source: a block may have been damaged on the way."""
_MIB = 1 << 20


class Impossible(RuntimeError):
    """A snapshot cannot be brought back from the sources that were named."""


class Want(NamedTuple):
    """An arena of this node to be refilled with what `rank` had at `step`."""

    rank: int
    step: int
    fd: int
    travel_from: tuple[int, ...]
    """Indices of nodes that keep a replica of `rank`; this node may be one."""
    shared_from: tuple[tuple[int, int], ...] = ()
    """(node index, twin rank) of who has the rest."""


@dataclass(frozen=True, slots=True)
class Spot:
    """A rank's snapshot in a node's memory."""

    index: int
    rank: int


class Item:
    """A block that is not here yet."""

    def __init__(self, part: Part, number: int, block: blocks.Block) -> None:
        self.part, self.number, self.block = part, number, block
        self.tried: collections.Counter[Spot] = collections.Counter()


class Part:
    """The travelling or the shared part of a payload."""

    def __init__(self, name: str, spots: list[Spot]) -> None:
        self.name = name
        self.candidates = dict.fromkeys(spots)
        """Who may still bring it."""
        self.offers: dict[Spot, Found] = {}
        """Who has said what it has."""
        self.sources: dict[Spot, Found] = {}
        """Whose copy is the right one."""
        self.first = 0
        """Where it begins in the payload."""
        self.digests: list[int] | None = None
        self.waiting: collections.deque[Item] = collections.deque()
        self.left: int | None = None
        """Blocks that are not done; None while they are not known."""
        self.reasons: list[str] = []

    def plan(self, cut: list[blocks.Block], digests: list[int]) -> None:
        """These blocks are needed."""
        self.digests, self.left = digests, len(cut)
        self.waiting.extend(Item(self, number, block) for number, block in enumerate(cut))

    def accept(self, spot: Spot, found: Found) -> None:
        """A right copy."""
        self.sources[spot] = found

    def refuse(self, spot: Spot, why: str) -> None:
        """Not from there."""
        if spot in self.candidates:
            del self.candidates[spot]
            self.sources.pop(spot, None)
            self.reasons.append(f"node {spot.index}: {why}")

    def spot_for(self, item: Item, index: int) -> Spot | None:
        """Where node `index` may read the block, if it is its turn: whoever has not failed with it comes first."""
        least = min((item.tried[spot] for spot in self.candidates), default=_ATTEMPTS)
        found = (spot for spot in self.sources if spot.index == index and item.tried[spot] == least < _ATTEMPTS)
        return next(found, None)

    def take(self, index: int) -> tuple[Item, Spot] | None:
        """A block for node `index` to bring."""
        if not any(spot.index == index for spot in self.sources):
            return None
        for item in self.waiting:
            if (spot := self.spot_for(item, index)) is not None:
                self.waiting.remove(item)
                return item, spot
        return None

    def hopeless(self) -> Item | bool:
        """A block that nobody can bring any more; True for all of them."""
        if self.left == 0:
            return False
        if not self.candidates:
            return self.waiting[0] if self.waiting else True
        return next((item for item in self.waiting if all(item.tried[spot] >= _ATTEMPTS for spot in self.candidates)), False)


class Refill:
    """See the module's docstring."""

    def __init__(self, want: Want) -> None:
        self.want = want
        self.travel = Part("travelling", [Spot(index, want.rank) for index in want.travel_from])
        self.shared = Part("shared", [Spot(*spot) for spot in want.shared_from])
        self.facts: Found | None = None
        self.ready = self.done = False
        self.reserving = False
        """Memory is being taken, beside the bytes that arrive already."""
        self._file: SlotFile | None = None
        self._place = 0
        self._view = memoryview(b"")

    def parts(self) -> tuple[Part, Part]:
        """Both."""
        return self.travel, self.shared

    # ---- what the sources say

    def claim(self, found: Found) -> bool:
        """Whether this is the first description of the rank's own snapshot: the caller prepares the memory then."""
        if self.facts is not None:
            return False
        self.facts = found._replace(trailer=found.trailer.prefix())
        return True

    def offer(self, part: Part, spot: Spot, found: Found) -> None:
        """A source has described what it has."""
        part.offers[spot] = found
        self.consider()

    def consider(self) -> None:
        """Decide about the offers, once there is something to compare them with."""
        if not self.ready:
            return
        for part, consider in ((self.travel, self._consider_travel), (self.shared, self._consider_shared)):
            while part.offers:
                consider(*part.offers.popitem())

    def _consider_travel(self, spot: Spot, found: Found) -> None:
        assert self.facts is not None
        if (found.trailer.prefix(), found.whole, found.twins) == (self.facts.trailer, self.facts.whole, self.facts.twins):
            self.travel.accept(spot, found)
        else:
            self.travel.refuse(spot, "it has another version of the step")

    def _consider_shared(self, spot: Spot, found: Found) -> None:
        facts, digests = self.facts, found.shared()
        assert facts is not None
        length, chunk = facts.whole - facts.trailer.travel, facts.trailer.chunk
        if not facts.twins or found.twins != facts.twins:
            return self.shared.refuse(spot, f"rank {spot.rank} is no twin: its key is {found.twins!r}, not {facts.twins!r}")
        if digests is None or (found.whole - found.trailer.travel, found.trailer.chunk) != (length, chunk):
            return self.shared.refuse(spot, f"the shared part of rank {spot.rank} has another size")
        if self.shared.digests is None:
            self.shared.plan(blocks.cut(length, length, chunk), digests)
        if digests != self.shared.digests:
            return self.shared.refuse(spot, f"the shared part of rank {spot.rank} differs from that of another twin")
        self.shared.accept(spot, found)

    def check(self) -> None:
        """Raises `Impossible`."""
        for part in self.parts() if self.ready else (self.travel,):  # before, it is not known whether there is a shared part
            if (item := part.hopeless()) is not False:
                where = f", byte {part.first + item.block.start}" if isinstance(item, Item) else ""
                why = "; ".join(part.reasons) or "no source was named"
                what = f"the {part.name} part of rank {self.want.rank}, step {self.want.step}{where}"
                raise Impossible(f"{what}, cannot be brought back: {why}")

    @property
    def complete(self) -> bool:
        """Whether every block is done, and there is memory for the next snapshot too."""
        return self.ready and not self.reserving and all(part.left == 0 for part in self.parts())

    # ---- the memory

    def prepare(self) -> None:
        """Find room, after `claim`. Raises `MemoryError`. When `reserving` is true afterwards, `reserve` is to be called."""
        facts = self.facts
        assert facts is not None
        self._file = file = SlotFile(self.want.fd)
        size = blocks.size_of_slot(facts.whole, facts.trailer.travel, facts.trailer.chunk)
        if file.capacity < size:
            self._require(2 * (size + size // 8))
            file.allocate(size + size // 8, touch=False)
            self.reserving = True
        self._place = file.begin()
        self._view = file.payload(self._place)

    def reserve(self) -> None:
        """Take the pages of both slots. Zeroing them takes as long as a fast network brings their bytes: so it is done meanwhile. Raises
        `MemoryError`."""
        assert self._file is not None
        try:
            os.posix_fallocate(self._file.fd, 0, len(self._file.memory))
        except OSError as error:
            raise MemoryError(f"two snapshot slots of rank {self.want.rank}: {error.strerror}") from None

    def _require(self, need: int) -> None:
        if need > (available := available_memory()):
            raise MemoryError(
                f"two snapshot slots of rank {self.want.rank} need {need / _MIB:.0f} MiB, {available / _MIB:.0f} MiB of memory are "
                "available: use fewer ranks per node, a smaller model, or a node with more memory"
            )

    def begin(self) -> None:
        """The memory is there: blocks can come. Under the caller's lock."""
        facts = self.facts
        assert facts is not None
        self.travel.plan(facts.trailer.blocks(facts.trailer.travel), facts.trailer.digests)
        self.shared.first = facts.trailer.travel
        if facts.whole == facts.trailer.travel:
            self.shared.left = 0
        self.ready = True
        self.consider()

    def place(self, item: Item) -> memoryview:
        """Where a block goes."""
        start = item.part.first + item.block.start
        return self._view[start : start + item.block.size]

    def finish(self) -> None:
        """Every block is verified: commit. Raises `CorruptSnapshot` for a manifest that contradicts what was said of it."""
        facts = self.facts
        assert facts is not None and self._file is not None
        trailer = facts.trailer._replace(digests=facts.trailer.digests + (self.shared.digests or []))
        with self._view[: facts.whole] as payload:
            manifest, begin = read_manifest(payload, trailer)
        sizes = [segment.length for segment in manifest.segments]
        travel, whole = begin + sum(sizes[: manifest.travelling]), begin + sum(sizes)
        if (travel, whole, manifest.key) != (trailer.travel, facts.whole, facts.twins):
            raise CorruptSnapshot(f"the manifest of rank {self.want.rank}, step {self.want.step}, does not fit its payload")
        blocks.seal(self._file, self._place, step=self.want.step, kind=facts.kind, length=whole, trailer=trailer)

    def close(self) -> None:
        """Unmap; nothing is under way any more."""
        self._view.release()
        if self._file is not None:
            self._file.close()
            self._file = None
