"""A long campaign: hundreds of recoveries in a row. `make chaos` runs it; it found a wake-up that gloo loses once in fifty recoveries."""

from __future__ import annotations

import os
import statistics
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_gemini import GeminiStrategy
from tests.chaos.conftest import ROWS
from tests.support.jobs import Recorder, Result, run_job, same
from tests.support.models import Net, Noisy, loader

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(900)]
WORLD, FAULTS = 4, 38
RUNS = int(os.environ.get("GEMINI_CHAOS", "0"))


class Still(Noisy):
    """Without noise: what workers draw at random is not repeated by a replaced rank's (a known limit)."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[index], self.x[index].sum(0, keepdim=True).sin()


def job(directory: Path, kind: str, where: str, faults: int, workers: int = 0) -> Result:
    configured = [{"kind": kind, "rank": i % WORLD, "step": 3 + 2 * i, "where": where} for i in range(faults)]

    def train() -> None:
        pl.seed_everything(1)
        trainer = pl.Trainer(
            accelerator="cpu", devices=WORLD, strategy=GeminiStrategy(faults=configured, recovery={"spares": 2}), max_steps=82,  # type: ignore[arg-type]
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, logger=False, limit_val_batches=0,
            default_root_dir=str(directory), callbacks=[Recorder(str(directory))],
        )  # fmt: skip
        many_forks = DataLoader(Still(36), batch_size=3, num_workers=workers, shuffle=True)  # short epochs
        trainer.fit(Net(width=256), many_forks if workers else loader(400))

    return run_job(directory, train, WORLD, timeout_s=200)


CASES = [(kind, where, 0) for kind in ("raise", "kill") for where in ("forward", "backward", "optimizer", "after_step")]


@pytest.mark.parametrize(("kind", "where", "workers"), [*CASES, ("kill", "after_step", 2)])
def test_campaign(tmp_path: Path, kind: str, where: str, workers: int) -> None:
    expected = job(tmp_path / "undisturbed", kind, where, 0, workers)
    seconds: list[float] = []
    for attempt in range(RUNS):
        result = job(tmp_path / str(attempt), kind, where, FAULTS, workers)
        same(expected, result)
        assert result.injected == len(result.recoveries) == FAULTS
        seconds += [sum(recovery["seconds"].values()) for recovery in result.recoveries]
    place = f"{where}, {workers} loader workers" if workers else where
    ROWS.append((kind, place, RUNS, len(seconds), statistics.median(seconds), max(seconds)))
