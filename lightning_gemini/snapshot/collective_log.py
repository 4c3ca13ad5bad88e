"""The log of collectives between steps: what lets a replaced rank catch up without disturbing its peers.

A replaced rank starts at a boundary and executes again what its predecessor had executed since: learning-rate schedulers, callbacks,
validation. The collectives in there (a metric's reduction, a barrier) are long past for its peers, which wait in a later one. Each
rank therefore keeps the results it got since its two last captures, in shared memory that outlives it; a replaced rank reads them
instead of communicating, until it has caught up. Results are made symmetric (see `rendezvous.group`), so that any rank's log serves.

States: three segments used in turn, one per capture of local state; entries older than the two kept captures are dropped with their
segment. Commit: payload first, then the segment's used-bytes word. When a segment is full, later entries are recorded as missing;
training goes on, and a recovery that needs such an entry says which setting to raise.
"""

from __future__ import annotations

import mmap
import os
import struct

import msgspec

_SEGMENTS = 3
_WORD = struct.Struct("<Q")
_ENTRY = struct.Struct("<QQH")  # index, length (or _MISSING), bytes of the group's name
_MISSING = (1 << 64) - 1
_PAGE = mmap.PAGESIZE


class CollectiveLog:
    """One rank's log over a memfd: one writer, readers in other processes."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        size = os.fstat(fd).st_size
        self._map: mmap.mmap | None = mmap.mmap(fd, size) if size else None
        self._capacity = (size - _PAGE) // _SEGMENTS
        self._current = self._newest() % _SEGMENTS if self._map is not None else 0

    @property
    def allocated(self) -> bool:
        """Whether there is room for anything."""
        return self._map is not None

    def allocate(self, capacity: int) -> None:
        """Room for `capacity` bytes of results per segment (touched only as far as used), empty."""
        if self._map is not None:
            self._map.close()
        self._capacity = -(-capacity // _PAGE) * _PAGE
        os.ftruncate(self.fd, 0)
        os.ftruncate(self.fd, _PAGE + _SEGMENTS * self._capacity)
        self._map = mmap.mmap(self.fd, _PAGE + _SEGMENTS * self._capacity)

    def close(self) -> None:
        """Unmap."""
        if self._map is not None:
            self._map.close()
            self._map = None

    # header page: word s = used bytes of segment s, word 8 + s = capture number of segment s

    def _get(self, word: int) -> int:
        assert self._map is not None, "allocate() first"
        return int(_WORD.unpack_from(self._map, word * 8)[0])

    def _set(self, word: int, value: int) -> None:
        assert self._map is not None, "allocate() first"
        _WORD.pack_into(self._map, word * 8, value)

    def _newest(self) -> int:
        return max(self._get(8 + segment) for segment in range(_SEGMENTS))

    def rotate(self, counters: dict[str, int]) -> None:
        """A capture of local state was taken: start a new segment with the counters (collectives so far, by group) of that moment."""
        number = self._newest() + 1
        self._current = number % _SEGMENTS
        self._set(self._current, 0)
        self._set(8 + self._current, number)
        self._write("", 0, msgspec.msgpack.encode(counters))

    def append(self, group: str, index: int, result: bytes | None) -> None:
        """Record the result of collective `index` of `group`; None: it was there, and did not fit the log it comes from."""
        self._write(group, index, result)

    def _write(self, group: str, index: int, data: bytes | None) -> None:
        name = group.encode()
        used = self._get(self._current)
        room = self._capacity - used - _ENTRY.size - len(name) - 4096  # leaves some to record what is missing
        missing = data is None or len(data) > room
        length, data = (_MISSING, b"") if missing or data is None else (len(data), data)
        record = _ENTRY.pack(index, length, len(name)) + name + data
        if used + len(record) > self._capacity:
            raise MemoryError("more collectives between two steps than snapshot.collective_log_mib can even count: raise it")
        base = _PAGE + self._current * self._capacity + used
        assert self._map is not None
        self._map[base : base + len(record)] = record
        self._set(self._current, used + len(record))

    def _entries(self) -> list[tuple[str, int, bytes | None]]:
        if self._map is None:
            return []
        found: list[tuple[str, int, bytes | None]] = []
        for segment in sorted(range(_SEGMENTS), key=lambda s: self._get(8 + s)):
            base = _PAGE + segment * self._capacity
            position, end = base, base + self._get(segment)
            while position < end:
                index, length, name_length = _ENTRY.unpack_from(self._map, position)
                position += _ENTRY.size
                name = self._map[position : position + name_length].decode()
                position += name_length
                size = 0 if length == _MISSING else length
                found.append((name, index, None if length == _MISSING else self._map[position : position + size]))
                position += size
        return found

    def results(self) -> dict[tuple[str, int], bytes | None]:
        """All kept results by (group, index); None where one did not fit."""
        return {(group, index): data for group, index, data in self._entries() if group}

    def counters(self) -> dict[str, int]:
        """Collectives completed so far, by group."""
        counters: dict[str, int] = {}
        for group, index, data in self._entries():
            if not group:
                for name, count in msgspec.msgpack.decode(data or b"\x80", type=dict[str, int]).items():
                    counters[name] = max(count, counters.get(name, 0))
            else:
                counters[group] = max(index + 1, counters.get(group, 0))
        return counters
