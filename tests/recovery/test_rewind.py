"""Going back to a snapshot that a recovery has made: a donor wrote the dead rank's tensors, and its local state must lie beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_gemini import GeminiStrategy
from tests.support.jobs import Recorder, Result, run_job, same
from tests.support.models import Net, loader


def job(directory: Path, *faults: dict[str, Any]) -> Result:
    def target() -> None:
        pl.seed_everything(1)
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=GeminiStrategy(snapshot={"every_n_steps": 4}, faults=list(faults)),  # type: ignore[arg-type]
            max_steps=8,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=directory,
            callbacks=[Recorder(str(directory))],
        )
        trainer.fit(Net(64), loader())

    return run_job(directory, target, 2)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return job(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize(
    ("first", "actions"),
    [([], [("rewind", 4)]), ([{"kind": "kill", "rank": 1, "step": 5}], [("in_place", 5), ("rewind", 5)])],
    ids=["of the cadence", "of a recovery"],
)
def test_back_to_a_snapshot(tmp_path: Path, undisturbed: Result, first: list[dict[str, Any]], actions: list[tuple[str, int]]) -> None:
    torn = {"kind": "kill", "rank": 1, "step": 6, "where": "optimizer"}  # all ranks write at once: no live replica is whole
    result = job(tmp_path, *first, torn)
    assert result.injected == len(first) + 1
    assert [(event["action"], event["target"]) for event in result.agent_events if event["event"] == "plan"] == actions
    same(undisturbed, result)
