"""Ranks load a checkpoint of other ranks through our strategies' `load_checkpoint`: any URL, any number of ranks, both layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lightning_gemini.compat.lightning import finish_saved_batch
from lightning_gemini.storage import layout, messages, resume
from tests.storage.helpers import in_processes, nodes
from tests.storage.lightning import Begin, Leave, Net, Resumed, State, environ, left, loader, same, trainer

STEP = 3


class Ours:
    """What the Strategies do."""

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return resume.load(self.lightning_module.trainer, str(checkpoint_path), weights_only=weights_only)  # type: ignore[attr-defined]

    def process_dataloader(self, dataloader: Any) -> Any:
        finish_saved_batch(self.lightning_module.trainer)  # type: ignore[attr-defined]
        return super().process_dataloader(dataloader)  # type: ignore[misc]


class OursDDP(Ours, DDPStrategy):
    pass


class OursFSDP2(Ours, ModelParallelStrategy):
    pass


STEPS: list[int] = []


class Counted(torch.optim.AdamW):
    """Resuming must not step: our optimizers have hooks that would wait for other ranks."""

    def step(self, *args: Any, **options: Any) -> Any:
        STEPS.append(1)
        return super().step(*args, **options)


class Counting(Net):
    def configure_optimizers(self) -> Any:
        groups = [{"params": [*self.first.parameters(), *self.last.parameters()], "lr": 1e-2}, {"params": self.body.parameters()}]
        optimizer = Counted(groups, lr=1e-3, betas=(0.8, 0.9))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2), "interval": "step"}}


class Before(Begin):
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        assert not STEPS, "an optimizer has stepped"


@pytest.fixture(scope="module", params=["fsdp2", "ddp"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, State]:
    """URL of a checkpoint of two ranks of one node."""
    with nodes([0, 1]) as (node,):
        state = left(request.param, [node], STEP)
        path = f"file://{tmp_path_factory.mktemp('tier')}/{layout.directory(STEP, 'a')}"
        node.persist(path, STEP)
        node.ask(messages.Commit, messages.Committed, path=path, step=STEP, nodes=[0])
        return path, state


def loaded(strategy: type[pl.strategies.Strategy], size: int, path: str, model: type[pl.LightningModule] = Counting) -> Resumed:
    def body(rank: int) -> Resumed:
        pl.seed_everything(6)
        begin, leave = Before(), Leave(-1, [])
        made = strategy(process_group_backend="gloo")  # type: ignore[call-arg]
        trainer(made, size, 5, [leave, begin]).fit(model(), loader(), ckpt_path=path)
        return Resumed(begin, leave)

    return in_processes(body, size, environ())[0]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("strategy", [OursFSDP2, OursDDP])
def test_every_layout_from_every_other(checkpoint: tuple[str, State], strategy: type[pl.strategies.Strategy], size: int) -> None:
    path, state = checkpoint
    found = loaded(strategy, size, path)
    same(found.state, state)
    assert (found.step, found.batch, found.sum) == (STEP, STEP, 1.5 * 5)


class Other(Counting):
    def __init__(self) -> None:
        super().__init__()
        self.more = torch.nn.Linear(2, 2)


class Reordered(Counting):
    def configure_optimizers(self) -> Any:
        return Counted(self.parameters(), lr=1e-3)


def test_another_model(checkpoint: tuple[str, State]) -> None:
    path, _ = checkpoint
    with pytest.raises(AssertionError, match="has no 'more.weight' .2 names are missing.: it is of another model"):
        loaded(OursFSDP2, 1, path, Other)


def test_another_optimizer(checkpoint: tuple[str, State]) -> None:
    path, _ = checkpoint
    with pytest.raises(AssertionError, match="optimizer_0 is not there, or has other parameters"):
        loaded(OursFSDP2, 1, path, Reordered)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    with pytest.raises((FileNotFoundError, ValueError)):
        resume.load(pl.Trainer(logger=False, accelerator="cpu"), str(tmp_path))
