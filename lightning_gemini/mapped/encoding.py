"""A batch as raw bytes, and back without a copy.

Seam: `encode(value)` gives parts to write one after the other; `decode(buffer)` builds the value over the buffer. Dense CPU tensors and
numpy arrays lie in it raw, aligned to 64 bytes; the rest (structure, strings, numbers, None, objects of the user's classes) is a pickle
that refers to them. What pickle cannot take raises its own error, with a hint, in the process that reads the data.

Layout: `<Q skeleton bytes> <Q buffers> (<Q offset> <Q length>)* skeleton … buffers …`. Such a buffer is only ever read by processes of the
same job and user, from an anonymous file that one of them has handed over.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Sequence
from typing import Any, cast

import torch

_ALIGN = 64
_HEAD = struct.Struct("<QQ")
_ROW = struct.Struct("<QQ")
Buffer = bytes | bytearray | memoryview


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, buffers: list[memoryview]) -> None:
        super().__init__(file, protocol=5, buffer_callback=lambda buffer: buffers.append(buffer.raw()))
        self._buffers = buffers

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not torch.Tensor or value.layout is not torch.strided or value.device.type != "cpu":
            return NotImplemented
        if value.requires_grad or value.is_quantized or value.is_conj() or value.is_neg():
            return NotImplemented
        if torch.empty_like(value, device="meta").stride() != value.stride():  # it overlaps, or has holes
            value = value.contiguous()
        raw = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage())
        start = value.storage_offset() * value.element_size()
        raw = raw[start : start + value.numel() * value.element_size()]
        return _tensor, (pickle.PickleBuffer(cast(Any, raw.numpy())), value.dtype, tuple(value.shape), value.stride())


def _tensor(buffer: Any, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    data = memoryview(buffer)
    if not data.nbytes:
        return torch.empty_strided(shape, stride, dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).as_strided(shape, stride)


def encode(value: Any) -> list[Buffer]:
    """`value` as parts whose concatenation `decode` reads; raw memory is referred to, not copied."""
    skeleton, buffers = io.BytesIO(), list[memoryview]()
    try:
        _Pickler(skeleton, buffers).dump(value)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise TypeError(f"a batch of type {type(value).__name__} cannot be handed to another process: {error}") from error
    text = skeleton.getvalue()
    position = _HEAD.size + _ROW.size * len(buffers) + len(text)
    rows, parts = [], list[Buffer]()
    for buffer in buffers:
        gap = -position % _ALIGN
        rows.append(_ROW.pack(position + gap, buffer.nbytes))
        parts += [bytes(gap), buffer]
        position += gap + buffer.nbytes
    return [b"".join([_HEAD.pack(len(text), len(buffers)), *rows, text]), *parts]


def size_of(parts: Sequence[Buffer]) -> int:
    """Bytes of all parts."""
    return sum(len(part) if isinstance(part, (bytes, bytearray)) else part.nbytes for part in parts)


def decode(buffer: Any) -> Any:
    """The value; its tensors and arrays are views of `buffer`, writable where it is."""
    data = memoryview(buffer)
    length, count = _HEAD.unpack_from(data)
    rows = [_ROW.unpack_from(data, _HEAD.size + _ROW.size * i) for i in range(count)]
    start = _HEAD.size + _ROW.size * count
    return pickle.loads(data[start : start + length], buffers=[data[at : at + size] for at, size in rows])
