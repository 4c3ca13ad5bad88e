"""The catalogue: every tensor of the training state, by name, and which bytes of it each rank owns.

Shared tensors are equal on all ranks (DDP: parameters and optimizer state): each rank owns an equal range of their concatenated bytes,
cut across tensors, so that the work of copying is divided evenly whatever the sizes. Private tensors are this rank's alone (under
FSDP2 every shard): their rank owns them whole. Buffers are not here: BatchNorm updates them from local batches inside the step, so they
belong to the rank-local state, which is written at the boundary itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import msgspec
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_gemini.state.raw import as_bytes


class Entry(NamedTuple):
    """One tensor: its name, its local part, and whether all ranks hold the same."""

    name: str
    tensor: torch.Tensor
    shared: bool


class Segment(msgspec.Struct, array_like=True, frozen=True):
    """A range of bytes of one tensor as it lies in a snapshot; shape and dtype suffice to create the tensor anew."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    shared: bool
    start: int
    length: int


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def parameters_of(optimizer: Optimizer) -> list[torch.Tensor]:
    """The parameters in the order of the optimizer's groups: the index in a name refers to it."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def catalogue(model: nn.Module, optimizers: Iterable[Optimizer], *, replicated: bool) -> list[Entry]:
    """All tensors of the state, in an order that is the same on every rank."""
    entries = [Entry(f"param/{name}", local(p.detach()), replicated) for name, p in model.named_parameters()]
    for number, optimizer in enumerate(optimizers):
        for index, parameter in enumerate(parameters_of(optimizer)):
            for key, value in sorted(optimizer.state.get(parameter, {}).items()):
                if isinstance(value, torch.Tensor):
                    entries.append(Entry(f"optim/{number}/{index}/{key}", local(value), replicated))
    return entries


def size_of(entries: Iterable[Entry]) -> int:
    """Bytes."""
    return sum(entry.tensor.numel() * entry.tensor.element_size() for entry in entries)


def owned(entries: list[Entry], rank: int, size: int) -> list[tuple[Segment, torch.Tensor]]:
    """What `rank` of `size` keeps: its range of the shared bytes and all of its private tensors."""
    total = size_of(entry for entry in entries if entry.shared)
    first, last = total * rank // size, total * (rank + 1) // size
    position, found = 0, []
    for entry in entries:
        length = entry.tensor.numel() * entry.tensor.element_size()
        if not entry.shared:
            found.append((_segment(entry, 0, length), entry.tensor))
            continue
        low, high = max(first, position), min(last, position + length)
        if low < high:
            found.append((_segment(entry, low - position, high - low), entry.tensor))
        position += length
    return found


def _segment(entry: Entry, start: int, length: int) -> Segment:
    tensor = entry.tensor
    return Segment(entry.name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), entry.shared, start, length)


def layout(entries: list[Entry]) -> list[tuple[str, list[int], str]]:
    """Names, shapes and dtypes: equal on all ranks where tensors are shared."""
    return [(entry.name, list(entry.tensor.shape), str(entry.tensor.dtype)) for entry in entries]


def target_of(segment: Segment, live: Mapping[str, torch.Tensor], optimizers: list[Optimizer]) -> torch.Tensor:
    """The live tensor a segment belongs to; optimizer state that does not exist yet is created."""
    if segment.name in live:
        return live[segment.name]
    assert segment.name.startswith("optim/"), f"{segment.name} is in the snapshot but not in the model"
    _, number, index, key = segment.name.split("/", 3)
    optimizer = optimizers[int(number)]
    parameter = parameters_of(optimizer)[int(index)]
    dtype: torch.dtype = getattr(torch, segment.dtype)
    whole: Any
    if isinstance(parameter, DTensor) and tuple(parameter.to_local().shape) == segment.shape:
        whole = torch.zeros_like(parameter, dtype=dtype)
    else:  # a scalar such as Adam's `step` lives on the CPU unless the optimizer is fused or capturable
        device = parameter.device if len(segment.shape) > 0 else torch.device("cpu")
        whole = torch.zeros(segment.shape, dtype=dtype, device=device)
    optimizer.state[parameter][key] = whole
    return local(whole)


def copy_in(tensor: torch.Tensor, start: int, data: torch.Tensor) -> None:
    """Write bytes into a live tensor."""
    with torch.no_grad():
        if tensor.is_contiguous():
            as_bytes(tensor)[start : start + data.numel()].copy_(data)
        else:
            whole = tensor.contiguous()
            as_bytes(whole)[start : start + data.numel()].copy_(data)
            tensor.copy_(whole)
