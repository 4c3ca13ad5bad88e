"""Checksums of a tensor snapshot, block by block: what a receiver verifies, chunk for chunk, against what the rank has written.

A payload of `length` bytes is cut into blocks of `chunk` bytes: first [0, travel), which peers keep, then [travel, length), which twins
hold (see `manifest`). The xxh3 of each block is taken by the rank while it copies, when the bytes are in its cache. The trailer, behind the
payload at a multiple of 8 bytes, has the cut and all digests; the slot's own digest is that of the trailer. So one checksum made
where the bytes were made covers every copy, wherever it lies, and any block can be verified, and fetched again, alone.

Failure: `CorruptSnapshot`, from a trailer that does not match its slot and from a block that does not match the trailer. No torch here.
"""

from __future__ import annotations

import array
import struct
import sys
from typing import NamedTuple

import xxhash

from lightning_gemini.snapshot.slots import CorruptSnapshot, Slot, SlotFile

_HEAD = struct.Struct("<QQQ")  # chunk, travel, number of digests
assert sys.byteorder == "little"


class Block(NamedTuple):
    """A range of a payload."""

    start: int
    size: int


def cut(length: int, travel: int, chunk: int) -> list[Block]:
    """The blocks of a payload, in order; none crosses `travel`."""
    return [Block(start, min(chunk, end - start)) for first, end in ((0, travel), (travel, length)) for start in range(first, end, chunk)]


def place_of_trailer(length: int) -> int:
    """Where the trailer of a payload begins in its slot."""
    return -(-length // 8) * 8


def size_of_slot(length: int, travel: int, chunk: int) -> int:
    """Bytes of a payload with its trailer."""
    return place_of_trailer(length) + _HEAD.size + 8 * len(cut(length, travel, chunk))


class Trailer(NamedTuple):
    """Cut and digests of a payload."""

    chunk: int
    travel: int
    digests: list[int]

    def encode(self) -> bytes:
        """As it lies behind the payload."""
        return _HEAD.pack(self.chunk, self.travel, len(self.digests)) + array.array("Q", self.digests).tobytes()

    @staticmethod
    def decode(data: bytes | memoryview) -> Trailer:
        """Inverse of `encode`; `data` may be longer. Raises `ValueError` for one that is cut short."""
        if len(data) < _HEAD.size:
            raise ValueError("a trailer is cut short")
        chunk, travel, count = _HEAD.unpack_from(data)
        if len(data) < _HEAD.size + 8 * count:
            raise ValueError("a trailer is cut short")
        digests = array.array("Q")
        digests.frombytes(data[_HEAD.size : _HEAD.size + 8 * count])
        return Trailer(chunk, travel, list(digests))

    def blocks(self, length: int) -> list[Block]:
        """The blocks that the digests are of."""
        return cut(length, self.travel, self.chunk)

    def prefix(self) -> Trailer:
        """Of the travelling part alone, as a replica has it."""
        return Trailer(self.chunk, self.travel, self.digests[: -(-self.travel // self.chunk)])


def digest(data: bytes | memoryview) -> int:
    """xxh3, 64 bits, of a block."""
    return xxhash.xxh3_64_intdigest(data)


def seal(file: SlotFile, place: int, *, step: int, kind: int, length: int, trailer: Trailer) -> None:
    """Write the trailer of a filled payload and commit its slot."""
    data = trailer.encode()
    start = place_of_trailer(length)
    with file.payload(place) as view:
        view[start : start + len(data)] = data
    file.commit(place, step=step, kind=kind, length=length, digest=digest(data))


def trailer_of(file: SlotFile, slot: Slot) -> Trailer:
    """The trailer of a committed slot, verified. Raises `CorruptSnapshot`."""
    with file.payload(slot.place) as view, view[place_of_trailer(slot.length) :] as tail:
        try:
            trailer = Trailer.decode(tail)
        except ValueError as error:
            raise CorruptSnapshot(f"tensors of step {slot.step}: {error}") from None
    if digest(trailer.encode()) != slot.digest or len(trailer.digests) != len(trailer.blocks(slot.length)):
        raise CorruptSnapshot(f"tensors of step {slot.step}: the list of checksums does not match its slot")
    return trailer


def verify(file: SlotFile, slot: Slot) -> Trailer:
    """The trailer, after every block has been found to match it. Raises `CorruptSnapshot`."""
    trailer = trailer_of(file, slot)
    with file.payload(slot.place) as view:
        for block, expected in zip(trailer.blocks(slot.length), trailer.digests, strict=True):
            with view[block.start : block.start + block.size] as part:
                if digest(part) != expected:
                    raise CorruptSnapshot(f"tensors of step {slot.step}: the checksum of byte {block.start} on differs")
    return trailer
