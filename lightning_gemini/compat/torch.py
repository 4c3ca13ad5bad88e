"""torch's private corners: DDP's bucket layout and FSDP2's state after an aborted step.

DDP rebuilds its buckets once, after its first backward, in the order in which gradients became ready; the layout decides the order of
summation. A wrapper made later must be brought to the same layout, or its sums differ in the last bit. `impose_layout` does that without
data and without peers: it makes gradients ready in the recorded order, one parameter after the other.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

OBJECT_BROADCASTS = 2
"""Collectives in one `broadcast_object_list`: sizes, then bytes."""


class ReadyOrder:
    """Records the order in which DDP's parameters get their gradients, until the buckets are rebuilt."""

    def __init__(self, ddp: DistributedDataParallel) -> None:
        self.order: list[int] = []
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._hook(index))
            for index, parameter in enumerate(p for p in ddp.module.parameters() if p.requires_grad)
        ]

    def _hook(self, index: int) -> Any:
        def record(_: torch.Tensor) -> None:
            self.order.append(index)

        return record

    @property
    def complete(self) -> bool:
        """Whether every parameter has got its gradient."""
        return len(self.order) == len(self._handles)

    def restart(self) -> None:
        """A new backward begins."""
        self.order.clear()

    def freeze(self) -> list[int]:
        """The first synchronized backward is over: stop recording."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        return self.order


def impose_layout(ddp: DistributedDataParallel, order: list[int]) -> None:
    """Bring a new wrapper to the buckets it would have after a first backward with gradients ready in `order`.

    Call it while the group answers alone: DDP broadcasts the new layout from rank 0 when it rebuilds.
    """
    parameters = [p for p in ddp.module.parameters() if p.requires_grad]
    if sorted(order) != list(range(len(parameters))):
        raise RuntimeError("the recorded order of gradients does not name every parameter once: use find_unused_parameters=True")
    saved = [parameter.grad for parameter in parameters]
    ddp.reducer.prepare_for_backward([])
    for index in order:
        parameters[index].grad = None
        torch.autograd.backward(parameters[index].reshape(-1)[:1].sum() * 0)
    ddp.reducer._rebuild_buckets()
    for parameter, grad in zip(parameters, saved, strict=True):
        parameter.grad = grad


def reset_fsdp(model: nn.Module) -> None:
    """Bring FSDP2 modules back to their state between steps after a forward or backward that did not finish (torch >= 2.13)."""
    if isinstance(model, FSDPModule):
        if not hasattr(model, "reset_iter_state"):
            raise RuntimeError("this version of torch cannot reset FSDP2 after an aborted step: torch >= 2.13 is needed")
        if model._get_fsdp_state()._is_root is not None:  # else it has not seen a forward yet
            model.reset_iter_state()
    else:
        for child in model.children():
            reset_fsdp(child)


def keep_groups_swappable() -> None:
    """Make `torch.distributed.new_group(backend="gloo")` give a group of ours too.

    A group of an explicitly named backend could neither be formed without a TCPStore nor be re-formed after a recovery; ours serves CPU and
    CUDA tensors alike. Lightning makes such a group around `prepare_data`.
    """
    if getattr(dist.new_group, "lightning_gemini", False):
        return
    original = dist.new_group

    @functools.wraps(original)
    def new_group(*args: Any, **kwargs: Any) -> Any:
        names = ("ranks", "timeout", "backend")
        kwargs |= dict(zip(names, args, strict=False))
        kwargs["backend"] = "gemini"
        return original(**kwargs)

    new_group.lightning_gemini = True  # type: ignore[attr-defined]
    dist.new_group = dist.distributed_c10d.new_group = new_group


def reshard_fsdp(model: nn.Module) -> None:
    """Free unsharded parameters that a forward without a backward has left (FSDP2 keeps the root's): only shards are state, and ranks
    must agree on whether the next forward gathers."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def shared_memory(tensor: torch.Tensor) -> tuple[int, int] | None:
    """(descriptor, bytes) of the shared memory that a tensor from a loader's worker lies in; None where it does not, or has no descriptor.
    The descriptor is the storage's own: duplicate it to keep it."""
    storage = tensor.untyped_storage()
    strategy = torch.multiprocessing.get_sharing_strategy()  # type: ignore[no-untyped-call]
    if not storage.is_shared() or strategy != "file_descriptor":
        return None
    fd, size = storage._share_fd_cpu_()
    return int(fd), int(size)


def buffers_of(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """A module's own buffers, live: those that are None too, which no public iterator tells, and which cannot be registered again."""
    return module._buffers


def is_persistent(module: nn.Module, name: str) -> bool:
    """Whether a buffer was registered to be in the `state_dict`."""
    return name not in module._non_persistent_buffers_set
