"""Dense tensors for the codec: dtype by name, shape and flags as words, content as raw bytes.

Seam: `is_dense` says which tensors; `take_apart` gives (name, words, buffer); `Layout.read` takes the words back, and `build` makes the
tensor once `nbytes` of content are known to be there. Only the elements are stored, not the storage around a view. The order of dimensions
in memory is kept (channels last stays so) where there are no holes; what overlaps or has holes comes back contiguous.

Words: flags, number of dimensions, shape, and with the flag `_PERMUTED` the dimensions from the slowest to the fastest.
Failure: `is_dense` is false -> the caller's business. Words that make no sense -> an exception of any kind from `read` or `build`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lightning_gemini.state.raw import as_bytes

DTYPES: dict[str, torch.dtype] = {
    str(value)[6:]: value for value in vars(torch).values() if isinstance(value, torch.dtype) and not str(value)[6:].startswith("q")
}
"""Name -> dtype, without the quantized ones."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_GRAD, _ACCELERATOR, _PARAMETER, _PERMUTED = 1, 2, 4, 8
_MOST_DIMENSIONS = 64


def is_dense(value: torch.Tensor) -> bool:
    """Whether its elements say all: not sparse, quantized or nested, and not without content (meta)."""
    return value.dtype in _NAMES and value.layout is torch.strided and not value.is_nested and not value.is_meta


def take_apart(value: torch.Tensor) -> tuple[str, list[int], Any]:
    """(name of the dtype, words, content); content may be the tensor's own memory. One on an accelerator is waited for."""
    flags = _GRAD * value.requires_grad | _ACCELERATOR * (not value.is_cpu) | _PARAMETER * (type(value) is not torch.Tensor)
    words, order = [flags, value.dim(), *value.shape], _order(value)
    source = value.detach().cpu()
    if order:
        words[0] |= _PERMUTED
        words += order
        source = source.permute(order)
    source = source.resolve_conj().resolve_neg().contiguous()
    flat = source.as_strided((source.numel(),), (1,))  # a single element may be contiguous with any stride
    return _NAMES[value.dtype], words, as_bytes(flat).numpy()


def _order(value: torch.Tensor) -> list[int]:
    """Dimensions from the slowest to the fastest; empty for a tensor in the usual order, and where some order does not say all."""
    if value.is_contiguous() or torch.empty_like(value, device="meta").stride() != value.stride():
        return []
    return sorted(range(value.dim()), key=value.stride().__getitem__, reverse=True)


@dataclass(slots=True)
class Layout:
    """What a tensor is, but for its content."""

    dtype: torch.dtype
    flags: int
    shape: list[int]
    order: list[int]

    @classmethod
    def read(cls, name: str, word: Callable[[], int]) -> Layout:
        """Takes as many words as it needs."""
        dtype, flags, dimensions = DTYPES[name], word(), word()
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        shape = [word() for _ in range(dimensions)]
        order = [word() for _ in range(dimensions)] if flags & _PERMUTED else list(range(dimensions))
        if sorted(order) != list(range(dimensions)):
            raise ValueError(f"dimensions in the order {order}")
        return cls(dtype, flags, shape, order)

    @property
    def nbytes(self) -> int:
        """Of the content."""
        return math.prod(self.shape) * self.dtype.itemsize

    def build(self, raw: bytearray, start: int, device: torch.device) -> torch.Tensor:
        """The tensor, of memory of its own; `device` is for one from an accelerator."""
        stored = [self.shape[dimension] for dimension in self.order]
        if self.nbytes:
            flat = torch.frombuffer(raw, dtype=torch.uint8, count=self.nbytes, offset=start).clone()
            found = flat.view(self.dtype).view(stored)
        else:
            found = torch.empty(stored, dtype=self.dtype)
        if self.flags & _PERMUTED:
            found = found.permute([self.order.index(dimension) for dimension in range(len(stored))])
        if self.flags & _ACCELERATOR:
            found = found.to(device)
        grad = bool(self.flags & _GRAD)
        if self.flags & _PARAMETER:
            return torch.nn.Parameter(found, requires_grad=grad)
        return found.requires_grad_() if grad else found
