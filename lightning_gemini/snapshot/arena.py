"""Tensors to shared memory and back.

Seam: `capture` fills a slot with the owned bytes and commits it; `restore` verifies a slot and copies it into live tensors. Payload:
length of the manifest (8 bytes), manifest (MessagePack list of segments and the rank-local state), then the bytes of each segment in
order. Copying and hashing go chunk by chunk, so that the hash reads what is still in cache.

Failure: a tensor changed by somebody while it was copied (its version counter moved) -> the capture is not committed and `Torn` is
raised; the caller captures again. A checksum that differs on restore -> `CorruptSnapshot`, nothing was written yet.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable

import msgspec
import torch
import xxhash

from lightning_gemini.snapshot.slots import CorruptSnapshot, Slot, SlotFile
from lightning_gemini.state.catalogue import Segment
from lightning_gemini.state.raw import as_bytes

_LENGTH = struct.Struct("<Q")
Owned = list[tuple[Segment, torch.Tensor]]


class Torn(RuntimeError):
    """A tensor was written while it was copied."""


class Manifest(msgspec.Struct, array_like=True):
    """What is in a payload, and the rank-local state of the same step."""

    segments: list[Segment]
    local: bytes = b""


def versions(tensors: Iterable[torch.Tensor]) -> list[int]:
    """Version counters of in-place writes (autograd's)."""
    return [tensor._version for tensor in tensors]


def payload_size(owned: Owned, local: bytes = b"") -> int:
    """Bytes a capture needs, with room for the manifest."""
    return sum(segment.length + 256 + len(segment.name) for segment, _ in owned) + len(local) + 4096


def capture(file: SlotFile, step: int, owned: Owned, *, chunk: int, local: bytes = b"", expected: list[int] | None = None) -> None:
    """Copy `owned` into the older slot and commit it as `step`.

    Args:
        expected: version counters at the boundary, compared after the copy.
        chunk: bytes copied and hashed at a time.
    """
    place = file.begin()
    manifest = msgspec.msgpack.encode(Manifest([segment for segment, _ in owned], local))
    digest = xxhash.xxh3_64()
    with file.payload(place) as view:
        head = _LENGTH.pack(len(manifest)) + manifest
        length = len(head) + sum(segment.length for segment, _ in owned)
        if length > len(view):
            raise MemoryError(f"a snapshot of {length} bytes does not fit its slot of {len(view)}: the optimizer's state has grown")
        view[: len(head)] = head
        digest.update(head)
        target = torch.frombuffer(view, dtype=torch.uint8)
        position = len(head)
        for segment, tensor in owned:
            source = as_bytes(tensor if tensor.is_contiguous() else tensor.contiguous())
            for start in range(segment.start, segment.start + segment.length, chunk):
                size = min(chunk, segment.start + segment.length - start)
                target[position : position + size].copy_(source[start : start + size])
                digest.update(view[position : position + size])
                position += size
        del target
    if expected is not None and versions(tensor for _, tensor in owned) != expected:
        raise Torn(f"a tensor was written outside the optimizer while step {step} was copied")
    file.commit(place, step=step, kind=0, length=position, digest=digest.intdigest())


def verify(file: SlotFile, slot: Slot, chunk: int) -> None:
    """Raise `CorruptSnapshot` unless the slot's bytes match its checksum."""
    digest = xxhash.xxh3_64()
    with file.payload(slot.place) as view:
        for start in range(0, slot.length, chunk):
            digest.update(view[start : min(start + chunk, slot.length)])
    if digest.intdigest() != slot.digest:
        raise CorruptSnapshot(f"tensors of step {slot.step}: checksum differs")


def manifest_of(file: SlotFile, slot: Slot) -> tuple[Manifest, int]:
    """The manifest of a slot, and where the bytes begin."""
    with file.payload(slot.place) as view:
        (size,) = _LENGTH.unpack_from(view)
        manifest = msgspec.msgpack.decode(bytes(view[_LENGTH.size : _LENGTH.size + size]), type=Manifest)
    return manifest, _LENGTH.size + size


def restore(file: SlotFile, slot: Slot, put: Callable[[Segment, torch.Tensor], None], *, wanted: Callable[[Segment], bool]) -> None:
    """Hand each wanted segment's bytes to `put`, which copies them; the slot must have been verified."""
    manifest, position = manifest_of(file, slot)
    with file.payload(slot.place) as view:
        data = torch.frombuffer(view, dtype=torch.uint8)
        for segment in manifest.segments:
            if wanted(segment):
                put(segment, data[position : position + segment.length])
            position += segment.length
        del data
