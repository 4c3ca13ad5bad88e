"""From the arenas of a node to whole boxes, in the storage process's own memory.

Seam: `gather(places, files, step) -> Gathered`. Local ranks that hold the same bytes have a range each, which may begin and end anywhere
in a tensor; DCP knows boxes only, so ranges are put together over all arenas of the node. Of what other nodes hold too, only this node's
share is copied (`mine`).

Failure: an arena without a committed slot of the step, a checksum that differs, ranges that leave a gap -> `CorruptSnapshot` or
`ValueError`; nothing has been written. A rank that overwrites its slot meanwhile takes the header away first (`SlotFile.begin`), so a
slot whose header is the same after the copy was whole while it was copied. No torch here.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from lightning_gemini.snapshot import blocks
from lightning_gemini.snapshot.manifest import Segment, manifest_of
from lightning_gemini.snapshot.slots import CorruptSnapshot, SlotFile
from lightning_gemini.storage.layout import RankState
from lightning_gemini.storage.messages import Place

Name = tuple[str, str]
"""Tensor and shard label: what names a box."""


class Range(NamedTuple):
    """A segment in an arena."""

    segment: Segment
    source: _Arena
    at: int
    """Where its bytes begin in the payload."""
    travels: bool


@dataclass(slots=True)
class Gathered:
    """What a node writes of a step."""

    boxes: dict[Name, tuple[Segment, bytearray]] = field(default_factory=dict)
    """Any segment of the box, and all of its bytes."""
    states: list[RankState] = field(default_factory=list)


class _Arena:
    """A verified slot."""

    def __init__(self, place: Place, file: SlotFile, step: int) -> None:
        slot = file.find(step)
        if slot is None:
            raise CorruptSnapshot(f"rank {place.rank} has no tensors of step {step}")
        self.place, self.file, self.slot = place, file, slot
        self.trailer = blocks.verify(file, slot)
        self.manifest, self.begin = manifest_of(file, slot)

    def state(self) -> RankState:
        with self.file.payload(self.slot.place) as view:
            head = bytes(view[: self.begin])
        slot = self.slot
        return RankState(self.place.rank, slot.step, slot.kind, slot.length, self.file.capacity, head, self.trailer.encode())

    def ranges(self) -> Iterator[Range]:
        position = self.begin
        for index, segment in enumerate(self.manifest.segments):
            yield Range(segment, self, position, index < self.manifest.travelling)
            position += segment.length

    def copy(self, at: int, length: int, target: bytearray, start: int) -> None:
        with self.file.payload(self.slot.place) as view:
            target[start : start + length] = view[at : at + length]


def mine(name: str, position: int, count: int) -> bool:
    """Whether the node at `position` of the `count` that hold a tensor writes it: spread by hash, the same on all."""
    return zlib.crc32(name.encode()) % count == position


def gather(places: list[Place], files: list[SlotFile], step: int) -> Gathered:
    """The boxes that this node writes of `step`, and the rest of its arenas. `files`: of the arenas, in the order of `places`."""
    arenas = [_Arena(place, file, step) for place, file in zip(places, files, strict=True)]
    found = Gathered(states=[arena.state() for arena in arenas])
    for name, ranges in _by_box(arenas).items():
        first = ranges[0].source.place
        if any(part.travels for part in ranges) or mine(name[0], first.position, first.count):
            found.boxes[name] = (ranges[0].segment, _assemble(name, ranges))
    for arena in arenas:
        if arena.file.find(step) != arena.slot:
            raise CorruptSnapshot(f"rank {arena.place.rank} has overwritten its tensors of step {step} while they were copied")
    return found


def _by_box(arenas: list[_Arena]) -> dict[Name, list[Range]]:
    boxes: defaultdict[Name, list[Range]] = defaultdict(list)
    for arena in arenas:
        for part in arena.ranges():
            boxes[part.segment.name, part.segment.shard].append(part)
    return boxes


def _assemble(name: Name, ranges: list[Range]) -> bytearray:
    ordered = sorted(ranges, key=lambda part: part.segment.start)
    data, position = bytearray(sum(part.segment.length for part in ordered)), 0
    for part in ordered:
        if part.segment.start != position:
            raise ValueError(f"{name[0]}: the ranks of this node do not have byte {position} of shard {name[1]!r}, or have it twice")
        part.source.copy(part.at, part.segment.length, data, position)
        position += part.segment.length
    return data
