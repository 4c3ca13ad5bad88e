"""Tensors to shared memory and back.

Seam: `capture` fills a slot with the owned bytes and commits it; `restore` copies a verified slot into live tensors. Payload: length of
the manifest (8 bytes), manifest (see `manifest`), then the bytes of each segment in order; behind it the checksums of its blocks
(`blocks`). Copying and hashing go chunk by chunk, so that the hash reads what is still in cache.

Failure: a tensor changed by somebody while it was copied (its version counter moved) -> the capture is not committed and `Torn` is
raised; the caller captures again. A checksum that differs on restore -> `CorruptSnapshot`, nothing was written yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from lightning_gemini.snapshot import blocks
from lightning_gemini.snapshot.manifest import Manifest, Segment, encode, manifest_of
from lightning_gemini.snapshot.slots import Slot, SlotFile
from lightning_gemini.state.ownership import Owned
from lightning_gemini.state.raw import as_bytes


class Torn(RuntimeError):
    """A tensor was written while it was copied."""


def versions(tensors: Iterable[torch.Tensor]) -> list[int]:
    """Version counters of in-place writes (autograd's)."""
    return [tensor._version for tensor in tensors]


def payload_size(owned: Owned, chunk: int, local: bytes = b"") -> int:
    """Bytes a capture needs, with room for the manifest and the checksums."""
    data = sum(part.length + 320 + len(part.name) for part, _ in owned.parts) + len(local) + 4096
    return blocks.size_of_slot(data + 2 * chunk, 0, chunk)


def capture(
    file: SlotFile,
    step: int,
    owned: Owned,
    *,
    chunk: int,
    local: bytes = b"",
    expected: list[int] | None = None,
    instead_of: int | None = None,
) -> None:
    """Copy `owned` into the older slot and commit it as `step`.

    Args:
        instead_of: a step whose slot is overwritten, if there is one.
        expected: version counters at the boundary, compared after the copy.
        chunk: bytes copied and hashed at a time.
    """
    place = file.begin(instead_of)
    manifest = Manifest([part for part, _ in owned.parts], local, owned.travelling, owned.key)
    head = encode(manifest)
    sizes = [part.length for part, _ in owned.parts]
    travel, length = len(head) + sum(sizes[: owned.travelling]), len(head) + sum(sizes)
    with file.payload(place) as view:
        if blocks.size_of_slot(length, travel, chunk) > len(view):
            raise MemoryError(f"a snapshot of {length} bytes does not fit its slot of {len(view)}: the optimizer's state has grown")
        digests: list[int] = []
        remaining = iter(blocks.cut(length, travel, chunk))
        block = next(remaining, None)
        for position in _copy(view, head, owned, chunk):
            while block is not None and block.start + block.size <= position:
                digests.append(blocks.digest(view[block.start : block.start + block.size]))
                block = next(remaining, None)
    if expected is not None and versions(owned.tensors) != expected:
        raise Torn(f"a tensor was written outside the optimizer while step {step} was copied")
    blocks.seal(file, place, step=step, kind=0, length=length, trailer=blocks.Trailer(chunk, travel, digests))


def _copy(view: memoryview, head: bytes, owned: Owned, chunk: int) -> Iterator[int]:
    """Fill the payload piece by piece; yields how far it is filled."""
    view[: len(head)] = head
    position = len(head)
    yield position
    target = torch.frombuffer(view, dtype=torch.uint8)
    for part, tensor in owned.parts:
        source = as_bytes(tensor if tensor.is_contiguous() else tensor.contiguous())
        for start in range(part.start, part.start + part.length, chunk):
            size = min(chunk, part.start + part.length - start)
            target[position : position + size].copy_(source[start : start + size])
            position += size
            yield position
    del target


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
