"""Two slots in shared memory, of which one is always whole: the container of every snapshot.

Seam: the owner calls `begin` (which takes the older slot and invalidates it), fills the payload, then `commit`. Readers see only
committed slots and verify the checksum of what they read.

States of a slot: empty -> filling -> committed -> filling … `commit` writes data first, then the header with its own checksum, and the
sequence number last, so that a kill at any moment leaves either the old header invalid or the new one whole. A torn header does not
match its checksum and counts as empty.

Layout: one page of headers, then slot 0, then slot 1, each `capacity` bytes.
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import NamedTuple

import xxhash

PAGE = mmap.PAGESIZE
_CAPACITY = struct.Struct("<Q")
_HEADER = struct.Struct("<QqQQQ")  # sequence, step, kind, length, digest of the payload
_SEAL = struct.Struct("<Q")  # xxh3 of the header
_STRIDE = 64


class Slot(NamedTuple):
    """A committed slot."""

    place: int
    sequence: int
    step: int
    kind: int
    length: int
    digest: int


class CorruptSnapshot(RuntimeError):
    """Bytes in a committed slot do not match their checksum; another source must be used."""


class SlotFile:
    """Two slots over a memfd. One writer, any number of readers in other processes."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map: mmap.mmap | None = None
        self.capacity = 0
        if os.fstat(fd).st_size >= PAGE:
            self._remap()

    def allocate(self, capacity: int, *, touch: bool = True) -> None:
        """Make both slots `capacity` bytes large, empty; `touch` takes the pages now. Raises OSError when the memory is not there."""
        self.capacity = -(-capacity // PAGE) * PAGE
        size = PAGE + 2 * self.capacity
        self._unmap()
        os.ftruncate(self.fd, max(size, os.fstat(self.fd).st_size))  # never smaller: a reader's mapping would end in SIGBUS
        os.pwrite(self.fd, bytes(PAGE), 0)
        if touch:
            os.posix_fallocate(self.fd, 0, size)
        self._remap(_CAPACITY.pack(self.capacity))

    def _remap(self, header: bytes | None = None) -> None:
        self._map = mmap.mmap(self.fd, os.fstat(self.fd).st_size)
        if header is not None:
            self._map[PAGE - _STRIDE : PAGE - _STRIDE + len(header)] = header
        (self.capacity,) = _CAPACITY.unpack_from(self._map, PAGE - _STRIDE)

    def _unmap(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None

    def close(self) -> None:
        """Unmap; views must have been released."""
        self._unmap()

    @property
    def memory(self) -> mmap.mmap:
        """The mapping."""
        assert self._map is not None, "allocate() first"
        return self._map

    def slots(self) -> list[Slot]:
        """Committed slots, oldest first."""
        found = [slot for index in (0, 1) if (slot := self._read(index)) is not None] if self._map is not None else []
        return sorted(found, key=lambda slot: slot.sequence)

    def _read(self, index: int) -> Slot | None:
        raw = bytes(self.memory[index * _STRIDE : (index + 1) * _STRIDE])
        sequence, step, kind, length, digest = _HEADER.unpack_from(raw)
        (seal,) = _SEAL.unpack_from(raw, _HEADER.size)
        if not sequence or seal != xxhash.xxh3_64_intdigest(raw[: _HEADER.size]):
            return None
        return Slot(index, sequence, step, kind, length, digest)

    def find(self, step: int) -> Slot | None:
        """The newest committed slot of `step`."""
        return next((slot for slot in reversed(self.slots()) if slot.step == step), None)

    def begin(self, instead_of: int | None = None) -> int:
        """Take the slot to overwrite and invalidate it: that of step `instead_of`, else an empty one, else the older. Returns its index."""
        kept = self.slots()
        same = [slot.place for slot in kept if slot.step == instead_of]
        index = same[-1] if same else 1 - kept[-1].place if kept else 0
        self.memory[index * _STRIDE : index * _STRIDE + 8] = bytes(8)
        return index

    def invalidate(self, slot: Slot) -> None:
        """Forget a slot whose bytes turned out to be corrupt."""
        self.memory[slot.place * _STRIDE : slot.place * _STRIDE + 8] = bytes(8)

    def payload(self, index: int) -> memoryview:
        """The bytes of a slot, for filling. Restore never hands this out: it copies (optimizers adopt tensors without copying)."""
        start = PAGE + index * self.capacity
        return memoryview(self.memory)[start : start + self.capacity]

    def commit(self, index: int, *, step: int, kind: int, length: int, digest: int) -> None:
        """Make the slot visible, atomically."""
        sequence = max((slot.sequence for slot in self.slots()), default=0) + 1
        header = _HEADER.pack(sequence, step, kind, length, digest)
        base = index * _STRIDE
        sealed = header + _SEAL.pack(xxhash.xxh3_64_intdigest(header))
        self.memory[base + 8 : base + len(sealed)] = sealed[8:]
        self.memory[base : base + 8] = sealed[:8]

    def write(self, data: bytes, *, step: int, kind: int) -> None:
        """begin, fill and commit a small payload. Raises ValueError when it does not fit."""
        if len(data) > self.capacity:
            raise ValueError(f"a snapshot of {len(data)} bytes does not fit its slot of {self.capacity}")
        index = self.begin()
        with self.payload(index) as view:
            view[: len(data)] = data
        self.commit(index, step=step, kind=kind, length=len(data), digest=xxhash.xxh3_64_intdigest(data))

    def read(self, slot: Slot) -> bytes:
        """A verified copy of a slot's payload. Raises `CorruptSnapshot`."""
        with self.payload(slot.place) as view:
            data = bytes(view[: slot.length])
        if xxhash.xxh3_64_intdigest(data) != slot.digest:
            raise CorruptSnapshot(f"snapshot of step {slot.step}: checksum differs")
        return data
