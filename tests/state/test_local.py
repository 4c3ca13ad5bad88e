"""The rank-local state, as far as it needs no job: what counts as plain, what is pickled by name, a round trip over a Trainer."""

from __future__ import annotations

import collections
import enum
import pickle
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torchmetrics import MeanMetric

from lightning_gemini.compat import lightning as compat
from lightning_gemini.state import local
from lightning_gemini.state.local import Boundary, Kind, LocalState, is_plain


class Color(enum.IntEnum):
    RED = 1


PLAIN = {
    "int": 1,
    "float": 1.5,
    "nan": float("nan"),
    "bool": True,
    "str": "x",
    "bytes": b"x",
    "complex": 1j,
    "none": None,
    "list": [1, [2, (3,)]],
    "set": {1, 2},
    "frozenset": frozenset({1}),
    "dict": {"a": {"b": [1]}},
    "tuple keys": {("a", 1): 2},
    "tensors in a list": [torch.ones(2)],
    "tensors in a dict": {"a": torch.ones(2)},
    "empty": [],
    "enum of numbers": Color.RED,
}
NOT_PLAIN = {
    "function": print,
    "class": int,
    "module": torch.nn.Linear(1, 1),
    "object": object(),
    "object in a list": [1, object()],
    "object in a dict": {"a": object()},
    "object as a key": {object(): 1},
    "parameter in a list": [torch.nn.Parameter(torch.ones(1))],
    "tensor with a graph": [torch.ones(1, requires_grad=True) * 2],
    "subclass of dict": collections.Counter("aab"),
    "named tuple": collections.namedtuple("Pair", "a b")(1, 2),
    "generator": (i for i in range(3)),
    "lock-like": open,
}


@pytest.mark.parametrize("value", PLAIN.values(), ids=PLAIN)
def test_plain(value: Any) -> None:
    assert is_plain(value)
    pickle.dumps(value)


@pytest.mark.parametrize("value", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_not_plain(value: Any) -> None:
    assert not is_plain(value)


# ---- a whole state, captured from one Trainer and put into another


class Module(pl.LightningModule):
    """Has one of each."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
        self.metric = MeanMetric()
        self.dice = random.Random(5)
        self.seen = 0
        self.history: list[Any] = []
        self.hook = print

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.seen += len(batch)
        loss = self.layer(batch).square().mean()
        self.metric.update(loss.detach())
        self.history.append(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), "interval": "step"}]


class Counting(pl.Callback):
    """Has a state, and a reference to the trainer's objects."""

    def __init__(self) -> None:
        self.batches = 0
        self.model: Any = None
        self.local: Any = None
        self.bar: Any = None
        self.mode = "at set-up"

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.local = LocalState(trainer)  # at set-up, as the strategy does: what has changed since is state

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches, "model": self.model}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches, self.model = state_dict["batches"], state_dict["model"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.bar = object()  # as Lightning's progress bar: of this process, and in no state_dict

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.batches, self.model = self.batches + 1, pl_module


def fitted(directory: Path, steps: int) -> pl.Trainer:
    torch.manual_seed(1)
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=directory,
        callbacks=[Counting()],
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(12, 2), batch_size=2))
    return trainer


def capture(trainer: pl.Trainer) -> tuple[LocalState, bytes]:
    state = trainer.callbacks[0].local
    return state, state.capture(Boundary(Kind.EXIT, 3, {"0": 2}, {"order": [1, 0]}, (torch.ones(1), None), None, {}))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_state_moves_from_one_process_s_objects_to_another_s(tmp_path: Path) -> None:
    old, new = fitted(tmp_path, 5), fitted(tmp_path, 2)
    (_, data), state = capture(old), new.callbacks[0].local
    boundary = state.decode(data)
    assert (boundary.kind, boundary.step, boundary.counters, boundary.wrapper) == (Kind.EXIT, 3, {"0": 2}, {"order": [1, 0]})
    state.restore(boundary)
    mine, theirs = new.lightning_module, old.lightning_module
    assert mine.seen == theirs.seen == 10 and new.global_step == 5 and new.fit_loop.epoch_loop.batch_progress.current.completed == 5
    assert len(mine.history) == 5 and torch.equal(torch.stack(mine.history), torch.stack(theirs.history))
    assert torch.equal(mine.layer[1].running_mean, theirs.layer[1].running_mean) and mine.layer[1].num_batches_tracked == 5
    assert mine.metric.compute() == theirs.metric.compute() and mine.metric.update_count == 5
    counting = new.callbacks[0]
    assert counting.batches == 5 and counting.model is mine, "an object of the process is pickled by name"
    assert mine.dice.random() == theirs.dice.random()
    assert new.optimizers[0].param_groups[0]["lr"] == old.optimizers[0].param_groups[0]["lr"] == 0.025
    assert new.lr_scheduler_configs[0].scheduler.last_epoch == 5
    assert new.callback_metrics == old.callback_metrics


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_restoring_changes_tensors_in_place_and_no_objects_of_others(tmp_path: Path) -> None:
    trainer = fitted(tmp_path, 2)
    state, data = capture(trainer)
    module = trainer.lightning_module
    running, progress = module.layer[1].running_mean, trainer.fit_loop.epoch_loop.batch_progress.current
    optimizer = compat.unwrap_optimizers(trainer)[0]
    held = optimizer.param_groups[0]["params"]
    bar, trainer.callbacks[0].mode = trainer.callbacks[0].bar, "changed since the boundary"
    module.seen, module.hook = -1, len
    running.fill_(9)
    progress.completed = 77
    state.restore(state.decode(data))
    assert module.seen == 4 and module.hook is len
    assert trainer.callbacks[0].bar is bar is not None and trainer.callbacks[0].mode == "at set-up"
    assert module.layer[1].running_mean is running and not (running == 9).any()
    assert trainer.fit_loop.epoch_loop.batch_progress.current is progress and progress.completed == 2
    assert optimizer.param_groups[0]["params"] is held


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_modules_left_in_evaluation_mode_train_again(tmp_path: Path) -> None:
    trainer = fitted(tmp_path, 2)
    trainer.lightning_module.train()
    trainer.lightning_module.layer[1].eval()
    state, data = capture(trainer)
    trainer.lightning_module.eval()
    state.restore(state.decode(data))
    assert trainer.lightning_module.training and not trainer.lightning_module.layer[1].training


def test_what_a_metric_holds() -> None:
    metric, other = MeanMetric(), MeanMetric()
    metric.update(torch.tensor(3.0))
    local._restore_metric(other, local._metric_state(metric))
    assert other.compute() == 3 and other.update_count == 1
