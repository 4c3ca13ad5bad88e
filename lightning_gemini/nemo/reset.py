"""Megatron between steps: what an attempt that did not finish has left behind is undone, so that the same step can begin again.

Seam: `settle` before a snapshot, `reset` after an aborted attempt. Tensors, buffers and generators are put back elsewhere; here are the
handles of communication that was under way, the flags that say which gradients have arrived, and timers that were not stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from lightning_gemini.compat import megatron as compat


def _groups(chunks: nn.Module) -> Iterator[Any]:
    """The bucket groups of Megatron's DDP, around each chunk of the model."""
    for chunk in chunks.children():
        wrapper = getattr(chunk, "module", None)
        for name in ("bucket_groups", "expert_parallel_bucket_groups"):
            yield from getattr(wrapper, name, None) or ()


def _gathers_late(group: Any) -> bool:
    return bool(group.ddp_config.use_distributed_optimizer and group.ddp_config.overlap_param_gather)


def settle(chunks: nn.Module) -> None:
    """With `overlap_param_gather`, parameters are still on their way when the optimizer has returned: wait for them, as NeMo does before it
    saves a checkpoint. What has not been asked for yet is asked for now."""
    for group in _groups(chunks):
        if _gathers_late(group) and (not group.param_gather_dispatched or group.param_gather_handle is not None):
            group.start_param_sync(force_sync=True)


def reset(chunks: nn.Module, timers: Any) -> None:
    """After an attempt that was cut short anywhere."""
    for group in _groups(chunks):
        group.reset()
        group.grad_reduce_handle = group.param_gather_handle = None
        if _gathers_late(group):
            group.param_gather_dispatched = True  # the parameters were restored whole
    for parameter in chunks.parameters():
        if hasattr(parameter, "grad_added_to_main_grad"):
            parameter.grad_added_to_main_grad = False
    compat.stop_timers(timers)
