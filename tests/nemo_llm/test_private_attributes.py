"""Megatron's private corners are as `compat.megatron` takes them: in a version that has moved them, these fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_gemini.compat import megatron as compat


def test_the_calculator_is_the_one_that_megatron_asks() -> None:
    calculator: Any = pytest.importorskip("megatron.core.num_microbatches_calculator")
    calculator.unset_num_microbatches_calculator()
    assert compat.microbatches_calculator() is None
    calculator.init_num_microbatches_calculator(0, None, 8, 2, 1)
    try:
        assert compat.microbatches_calculator().get() == calculator.get_num_microbatches() == 4
    finally:
        calculator.unset_num_microbatches_calculator()


def test_a_timer_that_was_not_stopped_can_be_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)  # there is no GPU to wait for
    timers = pytest.importorskip("megatron.core.timers").Timers(2, "minmax")
    timers("step", log_level=0).start()
    with pytest.raises(AssertionError):
        timers("step").start()
    compat.stop_timers(timers)
    timers("step").start()
