"""A step that writes into its batch, as NeMo's dither does: its repetition is given the batch as it was."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from lightning_gemini import GeminiStrategy
from lightning_gemini.hooks.inputs import Inputs
from tests.support.jobs import Recorder, run_job, same
from tests.support.models import Net, loader
from tests.support.plain import run_plain


@dataclass
class Batch:
    x: torch.Tensor
    name: str = "batch"


def test_attempts_after_the_first_get_what_it_got() -> None:
    inputs, batch = Inputs(), {"x": [torch.zeros(2)], "y": Batch(torch.ones(2))}
    for step in range(3):
        with inputs.step():
            for _ in range(3):
                inputs.give((batch,), {})
                assert batch["x"][0].tolist() == [step, step] and batch["y"].x.tolist() == [1, 1]  # type: ignore[union-attr, index]
                batch["x"][0].add_(1)  # type: ignore[index]


def test_a_step_that_writes_nothing_is_not_copied_twice(caplog: pytest.LogCaptureFixture) -> None:
    inputs, x = Inputs(), torch.zeros(2)
    with inputs.step():
        inputs.give(x)
    with inputs.step(), caplog.at_level(logging.WARNING):
        inputs.give(x)
        x.add_(1)
        inputs.give(x)
    assert "for the first time" in caplog.text
    with inputs.step():
        inputs.give(x)
        x.add_(1)
        inputs.give(x)
        assert x.tolist() == [1, 1]


def test_outside_of_a_step_nothing_is_kept() -> None:
    inputs, x = Inputs(), torch.zeros(2)
    for _ in range(2):
        inputs.give(x)
        x.add_(1)
    assert x.tolist() == [2, 2]


class Dithered(Net):
    """Adds noise to its batch in place, and keeps a mask as long as the most it has seen."""

    longest = 0

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        inputs = batch[0] if isinstance(batch, (list, tuple)) else batch
        inputs += 0.01 * torch.randn_like(inputs)
        loss: torch.Tensor = super().training_step(batch, batch_idx)
        return loss


def script(directory: Path, strategy: Callable[[], object]) -> Callable[[], None]:
    def train() -> None:
        pl.seed_everything(1)
        trainer = pl.Trainer(
            accelerator="cpu", devices=2, strategy=strategy(), max_steps=8, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, logger=False, default_root_dir=str(directory), callbacks=[Recorder(str(directory))],
            limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(Dithered(), loader())

    return train


@pytest.mark.parametrize("kind", ["kill", "raise"])
def test_a_survivor_s_step_is_the_same(tmp_path: Path, kind: str) -> None:
    faults = [{"kind": kind, "rank": 1, "step": step, "where": "backward"} for step in (0, 5)]
    expected = run_plain(tmp_path / "plain", script(tmp_path / "plain", lambda: "ddp"), 2)
    disturbed = run_job(tmp_path / "job", script(tmp_path / "job", lambda: GeminiStrategy(faults=faults)), 2)
    same(expected, disturbed)
    assert disturbed.injected == 2
