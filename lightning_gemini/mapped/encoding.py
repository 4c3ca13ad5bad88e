"""A batch as raw bytes, and back without a copy.

Seam: `encode(value)` gives parts to write one after the other; `decode(buffer)` builds the value over the buffer. Dense CPU tensors and
numpy arrays lie in it raw, aligned to 64 bytes; the rest (structure, strings, numbers, None, objects of the user's classes) is a pickle
that refers to them. What pickle cannot take raises its own error, with a hint, in the process that reads the data.

A large tensor that a loader's worker has put into shared memory already is not copied again: `Encoded.shared` names its descriptor, and
`decode` is given a map of it.

Layout: `<Q skeleton bytes> <Q buffers> (<Q place> <Q offset> <Q length>)* skeleton … buffers …`; place 0 is this buffer, k the k-th shared
one. Such a buffer is only ever read by processes of the same job and user, from an anonymous file that one of them has handed over.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from lightning_gemini.compat.torch import shared_memory

_ALIGN = 64
_HEAD = struct.Struct("<QQ")
_ROW = struct.Struct("<QQQ")
_SHARED_BYTES = 256 << 10
"""Smaller tensors are copied: a descriptor and a map cost more."""
_MOST_SHARED = 8
Buffer = bytes | bytearray | memoryview


@dataclass(slots=True)
class Encoded:
    """`parts` follow one another; `shared` are (descriptor, bytes) of tensors that stay where they are, valid while the value lives."""

    parts: list[Buffer]
    shared: list[tuple[int, int]]

    @property
    def size(self) -> int:
        """Bytes of everything."""
        return size_of(self.parts) + sum(size for _, size in self.shared)


class _Buffers:
    """What lies raw. Apart from the pickler, which would keep itself and the batch alive as its own callback."""

    def __init__(self, *, share: bool) -> None:
        self._share = share
        self.found: list[tuple[int, int, memoryview]] = []
        """(place, offset in a shared one, content)."""
        self.shared: list[tuple[int, int]] = []
        self._next = (0, 0)

    def __call__(self, buffer: pickle.PickleBuffer) -> None:
        (place, offset), self._next = self._next, (0, 0)
        self.found.append((place, offset, buffer.raw()))

    def expect(self, value: torch.Tensor, start: int) -> None:
        """The next one is that of `value`, `start` bytes into its storage."""
        if self._share and value.nbytes >= _SHARED_BYTES and len(self.shared) < _MOST_SHARED:
            found = shared_memory(value)
            if found is not None:
                self.shared.append(found)
                self._next = len(self.shared), start


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, buffers: _Buffers) -> None:
        super().__init__(file, protocol=5, buffer_callback=buffers)
        self._buffers = buffers

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not torch.Tensor or value.layout is not torch.strided or value.device.type != "cpu":
            return NotImplemented
        if value.requires_grad or value.is_quantized or value.is_nested or value.is_conj() or value.is_neg():
            return NotImplemented
        if torch.empty_like(value, device="meta").stride() != value.stride():  # it overlaps, or has holes
            value = value.contiguous()
        raw = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage())
        start = value.storage_offset() * value.element_size()
        raw = raw[start : start + value.numel() * value.element_size()]
        self._buffers.expect(value, start)
        return _tensor, (pickle.PickleBuffer(cast(Any, raw.numpy())), value.dtype, tuple(value.shape), value.stride())


def _tensor(buffer: Any, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    data = memoryview(buffer)
    if not data.nbytes:
        return torch.empty_strided(shape, stride, dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).as_strided(shape, stride)


def encode(value: Any, *, share: bool = False) -> Encoded:
    """`value` as parts whose concatenation `decode` reads; raw memory is referred to, not copied. With `share`, see `Encoded.shared`."""
    skeleton, buffers = io.BytesIO(), _Buffers(share=share)
    try:
        _Pickler(skeleton, buffers).dump(value)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise TypeError(f"a batch cannot be handed to another process: {error}") from error
    text = skeleton.getvalue()
    position = _HEAD.size + _ROW.size * len(buffers.found) + len(text)
    rows, parts = [], list[Buffer]()
    for place, offset, buffer in buffers.found:
        if not place:
            gap = -position % _ALIGN
            offset = position + gap
            parts += [bytes(gap), buffer]
            position = offset + buffer.nbytes
        rows.append(_ROW.pack(place, offset, buffer.nbytes))
    return Encoded([b"".join([_HEAD.pack(len(text), len(rows)), *rows, text]), *parts], buffers.shared)


def size_of(parts: Sequence[Buffer]) -> int:
    """Bytes of all parts."""
    return sum(len(part) if isinstance(part, (bytes, bytearray)) else part.nbytes for part in parts)


def decode(buffer: Any, shared: Sequence[Any] = ()) -> Any:
    """The value; its tensors and arrays are views of `buffer` and of the `shared` ones, writable where those are."""
    places = [memoryview(each) for each in (buffer, *shared)]
    data = places[0]
    length, count = _HEAD.unpack_from(data)
    rows = [_ROW.unpack_from(data, _HEAD.size + _ROW.size * i) for i in range(count)]
    start = _HEAD.size + _ROW.size * count
    return pickle.loads(data[start : start + length], buffers=[places[place][at : at + size] for place, at, size in rows])
