"""The catalogue: every tensor of the training state, by name, and who holds the same bytes of it.

Under DDP every rank holds every tensor. A DTensor says itself who does: its mesh and placements (FSDP2: its rank alone; HSDP: the ranks
along the replicated dimensions). A plain tensor under FSDP2 (Adam's `step`) counts as its rank's own. Which of them a step may change is in
`frozen`; which bytes of it a rank writes into its snapshot, and whether they travel, is in `ownership`. Buffers are not here: BatchNorm
updates them from local batches inside the step, so they belong to the rank-local state, which is written at the boundary itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_gemini.snapshot.manifest import Segment
from lightning_gemini.state.raw import as_bytes

Holders = tuple[int, ...] | range
"""Ranks in order; a range where that is all of them, which takes the same time at any size."""


class Entry(NamedTuple):
    """One tensor."""

    name: str
    tensor: torch.Tensor
    """The part that this rank holds."""
    holders: Holders
    """Ranks that hold the same bytes, this one among them, in order."""
    shard: str
    """Label of the bytes: equal on the holders and nowhere else; empty where all ranks hold them."""
    whole: tuple[int, ...]
    offset: tuple[int, ...]
    trained: bool = True
    """It is of an optimizer, or a parameter that requires grad or that an optimizer holds."""


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def parameters_of(optimizer: Optimizer) -> list[torch.Tensor]:
    """The parameters in the order of the optimizer's groups: the index in a name refers to it."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def catalogue(
    model: nn.Module, optimizers: Iterable[Optimizer], *, replicated: bool, rank: int, world: int, own: Container[int] = ()
) -> list[Entry]:
    """All tensors of the state, in an order that is the same on every rank.

    Args:
        replicated: every rank holds every tensor (DDP).
        own: ids of parameters that are this rank's alone nevertheless.
    """

    optimizers = list(optimizers)
    held = {id(parameter) for optimizer in optimizers for parameter in parameters_of(optimizer)}

    def entry(name: str, tensor: torch.Tensor, parameter: torch.Tensor) -> Entry:  # thousands, twice in a step
        holders, shard = holders_of(tensor, replicated=replicated and id(parameter) not in own, rank=rank, world=world)
        trained = tensor is not parameter or parameter.requires_grad or id(parameter) in held
        shape = tuple(tensor.shape)
        if isinstance(tensor, DTensor):
            return Entry(name, local(tensor.detach()), holders, shard, shape, offset_of(tensor), trained)
        return Entry(name, tensor.detach(), holders, shard, shape, (0,) * len(shape), trained)

    entries = [entry(f"param/{name}", parameter, parameter) for name, parameter in model.named_parameters()]
    for number, optimizer in enumerate(optimizers):
        for index, parameter in enumerate(parameters_of(optimizer)):
            for key, value in sorted(optimizer.state.get(parameter, {}).items()):
                if isinstance(value, torch.Tensor):
                    entries.append(entry(f"optim/{number}/{index}/{key}", value, parameter))
    return entries


def holders_of(tensor: torch.Tensor, *, replicated: bool, rank: int, world: int) -> tuple[Holders, str]:
    """Who holds the same bytes as this rank, and their label."""
    if replicated:
        return range(world), ""
    if not isinstance(tensor, DTensor):
        return (rank,), own_label(rank)
    sharded = tuple(not placement.is_replicate() for placement in tensor.placements)
    holders = _along(tensor.device_mesh, sharded, rank)
    return holders, "" if len(holders) == world else str(holders[0])


def own_label(rank: int) -> str:
    """Of bytes that this rank has whole, and nobody else."""
    return f"r{rank}"


@functools.lru_cache(maxsize=256)
def _along(mesh: DeviceMesh, sharded: tuple[bool, ...], rank: int) -> tuple[int, ...]:
    """Ranks of a mesh that differ from `rank` in coordinates of replicated dimensions only."""
    coordinate = (mesh.mesh == rank).nonzero()[0].tolist()
    own = tuple(place if cut else slice(None) for place, cut in zip(coordinate, sharded, strict=True))
    return tuple(sorted(mesh.mesh[own].flatten().tolist()))


def offset_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """Where the local part begins in the whole tensor."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.dim()
    key = tensor.device_mesh, tensor.placements, tensor.shape
    if key not in _offsets:  # torch takes long to tell
        chunks = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
        _offsets[key] = tuple(chunks[0].offsets) if chunks else (0,) * tensor.dim()
    return _offsets[key]


_offsets: dict[Any, tuple[int, ...]] = {}


def size_of(entries: Iterable[Entry]) -> int:
    """Bytes."""
    return sum(bytes_of(entry) for entry in entries)


def bytes_of(entry: Entry) -> int:
    """Bytes of the local part."""
    return entry.tensor.numel() * entry.tensor.element_size()


def segment(entry: Entry, start: int, length: int) -> Segment:
    """A range of an entry's bytes."""
    tensor = entry.tensor
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Segment(entry.name, tuple(tensor.shape), dtype, entry.shard, start, length, entry.whole, entry.offset)


def layout(entries: list[Entry]) -> list[tuple[str, list[int], str]]:
    """Names, shapes and dtypes: equal on all ranks where tensors are replicated."""
    return [(entry.name, list(entry.tensor.shape), str(entry.tensor.dtype)) for entry in entries]


def wanted(
    found: Segment, entries: Mapping[str, Entry], optimizers: list[Optimizer], label: Callable[[torch.Tensor], str], rank: int
) -> bool:
    """Whether a segment has bytes of the state of `rank`, whose label of a tensor `label` gives."""
    if found.shard == own_label(rank):  # also where this process does not know yet that it is its alone
        return True
    if found.name in entries:
        return entries[found.name].shard == found.shard
    return found.shard in ("", label(_parameter(found.name, optimizers)))  # optimizer state that does not exist yet


def _parameter(name: str, optimizers: list[Optimizer]) -> torch.Tensor:
    assert name.startswith("optim/"), f"{name} is in the snapshot but not in the model"
    _, number, index, _ = name.split("/", 3)
    return parameters_of(optimizers[int(number)])[int(index)]


def require_same(found: Segment, entries: Mapping[str, Entry]) -> None:
    """Raise `ValueError` where a snapshot is of another model than this process has built."""
    entry = entries.get(found.name)
    mine = (tuple(entry.tensor.shape), str(entry.tensor.dtype).removeprefix("torch.")) if entry else (found.shape, found.dtype)
    if mine != (found.shape, found.dtype):
        raise ValueError(
            f"the snapshot has {found.name} as {found.dtype} {list(found.shape)}, this process has built it as {mine[1]} {list(mine[0])}: "
            "all nodes must run the same script, with the same options and versions"
        )


def require_whole(restored: Mapping[str, int], live: Mapping[str, torch.Tensor], base: Container[str] = ()) -> None:
    """Raise `ValueError` where a snapshot has not brought all bytes of what it began to restore, or nothing of a parameter that is not of
    the frozen `base`."""
    for name, tensor in live.items():
        size = tensor.numel() * tensor.element_size()
        if restored.get(name, 0) != size and (name in restored or (name.startswith("param/") and name not in base)):
            raise ValueError(
                f"the snapshot has {restored.get(name, 0)} of the {size} bytes of {name} for this rank: it was made with another strategy, "
                "or another layout of the ranks"
            )


def target_of(found: Segment, live: Mapping[str, torch.Tensor], optimizers: list[Optimizer]) -> torch.Tensor:
    """The live tensor a segment belongs to; optimizer state that does not exist yet is created."""
    if found.name in live:
        return live[found.name]
    parameter = _parameter(found.name, optimizers)
    _, number, _, key = found.name.split("/", 3)
    dtype: torch.dtype = getattr(torch, found.dtype)
    whole: Any
    if isinstance(parameter, DTensor) and tuple(parameter.to_local().shape) == found.shape:
        whole = torch.zeros_like(parameter, dtype=dtype)
    else:  # a scalar such as Adam's `step` lives on the CPU unless the optimizer is fused or capturable
        device = parameter.device if len(found.shape) > 0 else torch.device("cpu")
        whole = torch.zeros(found.shape, dtype=dtype, device=device)
    optimizers[int(number)].state[parameter][key] = whole
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
