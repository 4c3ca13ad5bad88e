"""What the bytes of a tensor snapshot are: plain structs, no torch, so that agents can read them too.

A payload is the manifest, then the bytes of each segment in order. The first `travelling` segments are held live by too few nodes: their
bytes (and the manifest, with the rank-local state in it) are sent to peers. The others are held by *twins*: ranks of other nodes with the
same `key`, whose segments after the travelling ones are the same, byte for byte.
"""

from __future__ import annotations

import struct

import msgspec

from lightning_gemini.snapshot.slots import Slot, SlotFile

LENGTH = struct.Struct("<Q")
"""Of the manifest, at the start of a payload."""


class Segment(msgspec.Struct, array_like=True, frozen=True):
    """A range of bytes of one tensor as it lies in a snapshot; shape and dtype suffice to create the local tensor anew."""

    name: str
    shape: tuple[int, ...]
    """Of the local part."""
    dtype: str
    shard: str
    """Ranks with the same label hold the same bytes of this tensor; empty: all ranks do."""
    start: int
    length: int
    whole: tuple[int, ...] = ()
    """Shape of the whole tensor, of which this is a shard."""
    offset: tuple[int, ...] = ()
    """Where the local part begins in it."""


class Manifest(msgspec.Struct, array_like=True):
    """What is in a payload, and the rank-local state of the same step."""

    segments: list[Segment]
    local: bytes = b""
    travelling: int = 0
    """How many of the first segments are sent to peers."""
    key: str = ""
    """Ranks with the same key hold the same bytes after the travelling segments; empty: there are none."""


def encode(manifest: Manifest) -> bytes:
    """As it lies at the start of a payload, with its length."""
    data = msgspec.msgpack.encode(manifest)
    return LENGTH.pack(len(data)) + data


def decode(payload: bytes | memoryview) -> tuple[Manifest, int]:
    """The manifest of a payload, and where the bytes of its segments begin. Raises `msgspec.DecodeError`, `struct.error`."""
    (size,) = LENGTH.unpack_from(payload)
    return msgspec.msgpack.decode(payload[LENGTH.size : LENGTH.size + size], type=Manifest), LENGTH.size + size


def manifest_of(file: SlotFile, slot: Slot) -> tuple[Manifest, int]:
    """The manifest of a committed slot, and where the bytes of its segments begin."""
    with file.payload(slot.place) as view:
        return decode(view)
