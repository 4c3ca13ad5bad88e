"""What Megatron and NeMo keep for a rank outside of tensors, module and loops; part of the rank-local state of a boundary.

    trackers    the generators of Megatron's RNG tracker, from which dropout under tensor parallelism draws
    scalers     loss scales of fp16, which change before the optimizer writes
    calculator  the number of micro-batches, which a ramp-up of the batch size changes
    sampler     counters of NeMo's data sampler
    fetcher     how many micro-batches the loop has taken from the loader

Megatron's global memory buffers are not here: they hold nothing between two operations. Failure: none of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random

from lightning_gemini.compat import megatron as compat
from lightning_gemini.state.local import is_plain


def capture(optimizers: Iterable[Any], sampler: Any) -> dict[str, Any]:
    """Of Megatron's `optimizers`, and NeMo's `sampler` (None without one)."""
    tracker = megatron_random.get_cuda_rng_tracker()
    return {
        "trackers": {name: _state(state) for name, state in tracker.get_states().items()},
        "scalers": [optimizer.grad_scaler.state_dict() for optimizer in _scaled(optimizers)],
        "calculator": _plain(compat.microbatches_calculator()),
        "sampler": _plain(sampler),
    }


def restore(state: dict[str, Any], optimizers: Iterable[Any], sampler: Any) -> None:
    """Inverse of `capture`."""
    tracker = megatron_random.get_cuda_rng_tracker()
    now = tracker.get_states()
    tracker.set_states({name: _restored(now.get(name), saved) for name, saved in state["trackers"].items()})
    for optimizer, saved in zip(_scaled(optimizers), state["scalers"], strict=True):
        optimizer.grad_scaler.load_state_dict(saved)
    for holder, saved in ((compat.microbatches_calculator(), state["calculator"]), (sampler, state["sampler"])):
        if holder is not None:
            vars(holder).update(saved)


def _scaled(optimizers: Iterable[Any]) -> list[Any]:
    return [optimizer for optimizer in optimizers if getattr(optimizer, "grad_scaler", None) is not None]


def _plain(holder: Any) -> dict[str, Any]:
    return {} if holder is None else {name: value for name, value in vars(holder).items() if is_plain(value)}


def _state(state: Any) -> bytes:
    """With CUDA graphs a state is a generator, else a tensor of bytes."""
    tensor = state.get_state() if isinstance(state, torch.Generator) else state
    return bytes(tensor.cpu().numpy().tobytes())


def _restored(now: Any, saved: bytes) -> Any:
    tensor = torch.frombuffer(bytearray(saved), dtype=torch.uint8)
    if isinstance(now, torch.Generator):  # captured graphs hold on to it
        now.set_state(tensor)
        return now
    return tensor
