"""Tensors as plain bytes."""

from __future__ import annotations

import torch


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous CPU tensor as a flat uint8 view of the same memory."""
    flat = tensor.detach().reshape(-1)
    return (flat if flat.numel() != 1 else flat.as_strided((1,), (1,))).view(torch.uint8)  # of one element, any stride is contiguous


def pack(tensors: list[torch.Tensor]) -> bytes:
    """The bytes of small tensors, one after the other."""
    return b"".join(as_bytes(tensor.cpu().contiguous()).numpy().tobytes() for tensor in tensors)


def unpack(data: bytes, tensors: list[torch.Tensor]) -> None:
    """Inverse of `pack`, into existing tensors. Raises `RuntimeError` for data of another size."""
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    expected = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if flat.numel() != expected:
        raise RuntimeError(f"a replayed collective has {flat.numel()} bytes where {expected} are expected: the script is not deterministic")
    position = 0
    with torch.no_grad():
        for tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            tensor.copy_(flat[position : position + size].clone().view(tensor.dtype).view(tensor.shape))
            position += size
