"""The deadlines of `recovery` and the switches of `telemetry`: each key has its effect."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import CSVLogger

from lightning_gemini import GeminiStrategy
from lightning_gemini.agent.memory import HEARTBEAT_NS
from tests.support.jobs import Recorder, Result, run_job, same
from tests.support.models import Net, loader

WORLD = 2


class Trouble(pl.Callback):
    """Rank 1 after step 4, once: sleeps where it should go on, or stops beating its heart and sleeps."""

    def __init__(self, directory: Path, kind: str) -> None:
        self.marker, self.kind = directory / "happened", kind

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.kind == "none" or trainer.global_rank != 1 or trainer.global_step != 4 or self.marker.exists():
            return
        self.marker.touch()
        if self.kind == "silent":
            board = trainer.strategy.link.board
            beat = board.set
            board.set = lambda rank, word, value: None if word == HEARTBEAT_NS else beat(rank, word, value)
        time.sleep(60)


def job(directory: Path, kind: str = "none", logger: bool = False, **options: Any) -> Result:
    def train() -> None:
        pl.seed_everything(1)
        trainer = pl.Trainer(
            accelerator="cpu", devices=WORLD, strategy=GeminiStrategy(**options), max_epochs=1, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, logger=CSVLogger(str(directory)) if logger else False,
            default_root_dir=str(directory), callbacks=[Recorder(str(directory)), Trouble(directory, kind)], limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(Net(width=64), loader())

    return run_job(directory, train, WORLD, timeout_s=40)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return job(tmp_path_factory.mktemp("undisturbed"))


def test_a_silent_rank_is_replaced_after_heartbeat_timeout_s(tmp_path: Path, undisturbed: Result) -> None:
    result = job(tmp_path, "silent", recovery={"heartbeat_timeout_s": 2.0})
    same(undisturbed, result)
    assert "silent for" in result.output and len(result.recoveries) == 1


def test_a_rank_that_does_not_stand_still_is_replaced_after_regroup_timeout_s(tmp_path: Path, undisturbed: Result) -> None:
    fault = {"kind": "raise", "rank": 0, "step": 4, "where": "after_step"}
    result = job(tmp_path, "sleep", faults=[fault], recovery={"regroup_timeout_s": 2.0})
    same(undisturbed, result)
    assert "did not stand still" in result.output and result.injected == 1


@pytest.mark.parametrize("on", [True, False])
def test_telemetry(tmp_path: Path, on: bool) -> None:
    fault = {"kind": "raise", "rank": 0, "step": 4, "where": "forward"}
    telemetry = {"banner": on, "log_to_logger": on, "directory": str(tmp_path / "elsewhere")}
    result = job(tmp_path, logger=True, faults=[fault], telemetry=telemetry)
    assert result.exit_status == 0, result.output
    assert ("warm spare(s)" in result.output) == on
    assert ("gemini/recovery_s" in next(tmp_path.rglob("metrics.csv")).read_text()) == on
    assert (tmp_path / "elsewhere" / "agent.jsonl").exists() and not (tmp_path / "gemini").exists()
