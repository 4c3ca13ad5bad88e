"""What this node can give to those who refill a rank: snapshots in its own ranks' arenas, and replicas.

`look` finds a committed snapshot and reads its manifest, of which it verifies the blocks. The rest is verified by who takes it. Failure:
`LookupError` says what is missing, `CorruptSnapshot` what is damaged.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import msgspec

from lightning_gemini.replication.arenas import Held
from lightning_gemini.replication.store import Store
from lightning_gemini.snapshot import blocks
from lightning_gemini.snapshot.manifest import LENGTH, Manifest, decode
from lightning_gemini.snapshot.slots import CorruptSnapshot, Slot, SlotFile


class Copy(NamedTuple):
    """A committed snapshot, or the travelling part of one."""

    file: SlotFile
    slot: Slot
    trailer: blocks.Trailer
    whole: int
    """Bytes of the whole payload."""
    twins: str
    """The manifest's key."""

    def view(self) -> memoryview:
        """Its bytes."""
        return self.file.payload(self.slot.place)[: self.slot.length]


class Shelf:
    """See the module's docstring."""

    def __init__(self, held: Held, store: Store) -> None:
        self._held, self._store = held, store

    def look(self, rank: int, step: int, *, replica_first: bool = False) -> Copy:
        """The snapshot of `rank` at `step`, in its arena or else a replica of it."""
        places = [self._in_arena, self._store.find]
        found = next((found for look in (places[::-1] if replica_first else places) if (found := look(rank, step)) is not None), None)
        if found is None:
            raise LookupError(f"rank {rank} has no snapshot of step {step} here")
        trailer = blocks.trailer_of(*found)
        with found[0].payload(found[1].place) as view, view[: found[1].length] as payload:
            manifest, begin = read_manifest(payload, trailer)
        return Copy(*found, trailer, begin + sum(segment.length for segment in manifest.segments), manifest.key)

    def _in_arena(self, rank: int, step: int) -> tuple[SlotFile, Slot] | None:
        arena = self._held.arena(rank)
        slot = arena.find(step) if arena is not None else None
        return None if arena is None or slot is None else (arena, slot)


def read_manifest(payload: memoryview, trailer: blocks.Trailer) -> tuple[Manifest, int]:
    """The manifest of a payload, and where the bytes of the segments begin. Raises `CorruptSnapshot`."""
    try:
        _verify_until(LENGTH.size, payload, trailer)
        _verify_until(LENGTH.size + LENGTH.unpack_from(payload)[0], payload, trailer)
        return decode(payload)
    except (struct.error, msgspec.DecodeError) as error:
        raise CorruptSnapshot(f"the manifest cannot be read: {error}") from None


def _verify_until(end: int, payload: memoryview, trailer: blocks.Trailer) -> None:
    for block, digest in zip(trailer.blocks(len(payload)), trailer.digests, strict=True):
        if block.start >= end:
            return
        with payload[block.start : block.start + block.size] as part:
            if blocks.digest(part) != digest:
                raise CorruptSnapshot(f"the checksum of byte {block.start} on, where the manifest lies, differs")
