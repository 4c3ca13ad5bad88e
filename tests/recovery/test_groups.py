"""A module that holds process groups of its own, `new_group` and DeviceMesh, and computes with them: they go on after a death."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from lightning_gemini import GeminiStrategy
from tests.support.jobs import Recorder, Result, run_job, same
from tests.support.models import Net, loader
from tests.support.plain import run_plain

WORLD = 4


class Grouped(Net):
    """Its loss depends on sums over three kinds of groups."""

    def setup(self, stage: str) -> None:
        self.evens = dist.new_group([0, 2])
        self.mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        seen = batch[0].mean().detach().reshape(1)
        for group in (self.mesh["rows"].get_group(), self.mesh["columns"].get_group(), dist.group.WORLD):
            dist.all_reduce(seen, group=group)
        if self.global_rank % 2 == 0:
            dist.broadcast(seen, src=2, group=self.evens)
        return loss * (1 + 0.01 * seen.squeeze())


class Agreeing(pl.Callback):
    """After each step rank 0 tells all something that only this moment knows."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        said = trainer.strategy.broadcast(os.urandom(trainer.global_step).hex())  # of another length each time
        pl_module.objects = [*getattr(pl_module, "objects", []), said]  # type: ignore[assignment]
        trainer.strategy.barrier()


def train(directory: Path, strategy: Any, *callbacks: pl.Callback) -> None:
    pl.seed_everything(1)
    trainer = pl.Trainer(
        accelerator="cpu", devices=WORLD, strategy=strategy, max_epochs=2, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, logger=False, default_root_dir=str(directory), callbacks=[Recorder(str(directory)), *callbacks],
    )  # fmt: skip
    trainer.fit(Grouped(), loader(), loader(24, shuffle=False))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Lightning's own ddp, with gloo's own groups."""
    directory = tmp_path_factory.mktemp("plain")
    return run_plain(directory, lambda: train(directory, "ddp"), WORLD)


@pytest.mark.parametrize(("kind", "rank"), [("kill", 0), ("stop", 2), ("raise", 3)])
def test_groups_of_the_user_survive(tmp_path: Path, undisturbed: Result, kind: str, rank: int) -> None:
    faults = [{"kind": kind, "rank": rank, "step": 1}, {"kind": kind, "rank": (rank + 1) % WORLD, "step": 3, "where": "backward"}]
    result = run_job(tmp_path, lambda: train(tmp_path, GeminiStrategy(faults=faults)), WORLD)  # type: ignore[arg-type]
    same(undisturbed, result)
    assert result.injected == 2 and len(result.recoveries) == 2


def test_a_replaced_rank_has_said_what_its_peers_have_heard(tmp_path: Path, undisturbed: Result) -> None:
    faults = [{"kind": "kill", "rank": 0, "step": 3, "where": "after_step"}]
    result = run_job(tmp_path, lambda: train(tmp_path, GeminiStrategy(faults=faults), Agreeing()), WORLD)  # type: ignore[arg-type]
    same(undisturbed, result)
    assert result.injected == len(result.recoveries) == 1
    heard = result.ranks[1]["objects"]
    assert [len(said) // 2 for said in heard] == [*range(1, 13)]
    assert all(result.ranks[rank]["objects"] == heard for rank in range(WORLD))
