from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_gemini import GeminiFSDP2Strategy
from tests.support.campaign import more
from tests.support.jobs import Recorder, Result, run_job, same
from tests.support.models import Net, loader

WORLD = 3


def train(directory: Path, faults: list[dict[str, Any]]) -> None:
    pl.seed_everything(1)
    trainer = pl.Trainer(
        accelerator="cpu", devices=WORLD, strategy=GeminiFSDP2Strategy(data_parallel_size=WORLD, tensor_parallel_size=1, faults=faults),  # type: ignore[arg-type]
        max_epochs=2, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, logger=False, gradient_clip_val=0.5,
        default_root_dir=str(directory), callbacks=[Recorder(str(directory))], num_sanity_val_steps=1, val_check_interval=3,
    )  # fmt: skip
    trainer.fit(Net(fsdp=True), loader(), loader(24, shuffle=False))


def job(directory: Path, *faults: dict[str, Any]) -> Result:
    return run_job(directory, lambda: train(directory, list(faults)), WORLD)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return job(tmp_path_factory.mktemp("undisturbed"))


CASES = [
    ("kill", "backward", 0, 0),
    ("raise", "forward", 5, 2),
    ("kill", "optimizer", 5, 0),
    ("raise", "optimizer", 6, 1),
    ("kill", "validation", 6, 2),
]
MORE = [
    ("kill", "forward", 5, 1),
    ("raise", "backward", 4, 1),
    ("kill", "after_step", 3, 1),
]


@pytest.mark.parametrize(("kind", "where", "step", "rank"), [*CASES, *more(*MORE)])
def test_fault(tmp_path: Path, undisturbed: Result, kind: str, where: str, step: int, rank: int) -> None:
    result = job(tmp_path, {"kind": kind, "rank": rank, "step": step, "where": where})
    same(undisturbed, result)
    assert result.injected == 1
    assert len(result.recoveries) == 1
