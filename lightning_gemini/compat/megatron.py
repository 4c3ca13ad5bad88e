"""Megatron's private corners, of megatron-core as NeMo 2.5.3 wants it. Used and tested where it is installed only (`tests/nemo_llm`)."""

from __future__ import annotations

from typing import Any


def microbatches_calculator() -> Any:
    """The object that counts micro-batches and ramps up the batch size: a global of Megatron's, of which functions tell parts only."""
    from megatron.core import num_microbatches_calculator

    return num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR


def stop_timers(timers: Any) -> None:
    """Megatron's timers refuse to be started when an aborted step has left them running; no public call stops them without a barrier."""
    for timer in getattr(timers, "_timers", {}).values():
        timer._started = False
