"""SIGTERM and SIGINT to the agent end the job in Lightning's way: all ranks after the same step, hooks called, nothing left."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest

from lightning_gemini import GeminiStrategy
from lightning_gemini.telemetry.events import read_events
from tests.support.jobs import run_job
from tests.support.models import Net, loader

WORLD = 2


class Witness(pl.Callback):
    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        time.sleep(0.02)
        if trainer.global_step == 3:
            (self.directory / f"running{trainer.global_rank}").touch()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        (self.directory / f"ended{trainer.global_rank}").write_text(f"{type(exception).__name__} {trainer.global_step}")


def train(directory: Path) -> None:
    trainer = pl.Trainer(
        strategy=GeminiStrategy(), accelerator="cpu", devices=WORLD, max_steps=100000, callbacks=[Witness(directory)], logger=False,
        default_root_dir=str(directory), enable_progress_bar=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Net(width=32), loader())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_agent_is_asked_to_end(tmp_path: Path, number: signal.Signals) -> None:
    def ask(pid: int) -> None:
        deadline = time.monotonic() + 60
        while not all((tmp_path / f"running{rank}").exists() for rank in range(WORLD)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(pid, number)

    began = time.monotonic()
    result = run_job(tmp_path, lambda: train(tmp_path), WORLD, during=ask)
    assert result.exit_status == 128 + number, result.output
    ends = {(tmp_path / f"ended{rank}").read_text() for rank in range(WORLD)}
    assert len(ends) == 1 and ends.pop().startswith("SIGTERMException"), "ranks ended after different steps"
    assert time.monotonic() - began < 25
    assert read_events(str(tmp_path / "gemini" / "agent.jsonl"))[-1]["event"] == "end"
