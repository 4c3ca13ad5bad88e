"""Every kind of fault at every place, DDP, three ranks, several buckets: bit-identical to the undisturbed run and to Lightning's ddp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_gemini import GeminiCallback, GeminiStrategy
from tests.support.jobs import Recorder, Result, run_job, same
from tests.support.models import Net, loader
from tests.support.plain import run_plain

WORLD = 3


class Identity(pl.Callback):
    """Whether `fit` ended with the very objects it started with."""

    def _objects(self, trainer: pl.Trainer, model: pl.LightningModule) -> list[int]:
        optimizer = getattr(trainer.strategy.optimizers[0], "optimizer", trainer.strategy.optimizers[0])
        return [id(model), id(model.net), id(optimizer), id(trainer.train_dataloader), *map(id, trainer.callbacks)]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.before = self._objects(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.objects = self._objects(trainer, pl_module) == self.before  # type: ignore[assignment]


def train(directory: Path, strategy: Any, *callbacks: pl.Callback) -> None:
    pl.seed_everything(1)
    trainer = pl.Trainer(
        accelerator="cpu", devices=WORLD, strategy=strategy, max_epochs=2, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, logger=False, gradient_clip_val=0.5, default_root_dir=str(directory),
        callbacks=[Identity(), Recorder(str(directory)), *callbacks], num_sanity_val_steps=1, val_check_interval=3,
    )  # fmt: skip
    trainer.fit(Net(), loader(), loader(24, shuffle=False))


def job(directory: Path, *faults: dict[str, Any], **options: Any) -> Result:
    return run_job(directory, lambda: train(directory, GeminiStrategy(faults=list(faults), **options)), WORLD)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Lightning's own ddp."""
    directory = tmp_path_factory.mktemp("plain")
    return run_plain(directory, lambda: train(directory, "ddp"), WORLD)


def test_without_a_fault(tmp_path: Path, undisturbed: Result) -> None:
    same(undisturbed, job(tmp_path))


def test_the_callback_may_be_listed_too(tmp_path: Path, undisturbed: Result) -> None:
    same(undisturbed, run_job(tmp_path, lambda: train(tmp_path, "gemini", GeminiCallback()), WORLD))


CASES = [
    ("kill", "forward", 5, 1),
    ("kill", "forward", 0, 0),
    ("kill", "forward", 15, 2),
    ("kill", "backward", 5, 0),
    ("kill", "backward", 0, 1),
    ("kill", "optimizer", 5, 1),
    ("kill", "before_step", 0, 2),
    ("kill", "before_step", 6, 0),
    ("kill", "after_step", 6, 1),
    ("kill", "after_step", 16, 0),
    ("kill", "validation", 6, 1),
    ("kill", "callback", 8, 2),
    ("raise", "forward", 5, 1),
    ("raise", "backward", 5, 2),
    ("raise", "backward", 0, 1),
    ("raise", "optimizer", 5, 0),
    ("raise", "before_step", 6, 0),
    ("raise", "after_step", 8, 1),
    ("raise", "after_step", 16, 2),
    ("raise", "validation", 3, 0),
    ("stop", "forward", 4, 1),
    ("stop", "validation", 6, 2),
    ("exit", "forward", 4, 1),
    ("segv", "backward", 4, 2),
]


@pytest.mark.parametrize(("kind", "where", "step", "rank"), CASES)
def test_fault(tmp_path: Path, undisturbed: Result, kind: str, where: str, step: int, rank: int) -> None:
    result = job(tmp_path, {"kind": kind, "rank": rank, "step": step, "where": where})
    same(undisturbed, result)
    assert result.injected == 1
    assert [recovery["step"] for recovery in result.recoveries] == [step]
    assert all(record["objects"] for other, record in result.ranks.items() if other != rank), "a healthy rank was rebuilt"
    pids = result.pids()
    assert all(pids[other] == [record["pid"]] for other, record in result.ranks.items() if other != rank or kind == "raise")
    assert kind == "raise" or len(pids[rank]) == 2


def test_many_faults_in_one_run(tmp_path: Path, undisturbed: Result) -> None:
    kinds = ["kill", "raise", "exit", "raise"]
    faults = [
        {"kind": kinds[step % 4], "rank": step % WORLD, "step": step, "where": ("forward", "backward")[step % 2]} for step in range(1, 15)
    ]
    result = job(tmp_path, *faults)
    same(undisturbed, result)
    assert result.injected == len(faults) == len(result.recoveries)


@pytest.mark.parametrize("snapshot", [{"background": False}, {"chunk_kib": 4}, {"local_state_mib": 1, "collective_log_mib": 1}])
def test_snapshot_settings_change_nothing_in_the_result(tmp_path: Path, undisturbed: Result, snapshot: dict[str, Any]) -> None:
    result = job(tmp_path, {"kind": "kill", "rank": 1, "step": 6, "where": "after_step"}, snapshot=snapshot)
    same(undisturbed, result)
    assert len(result.recoveries) == 1
