"""A rank-local state for another machine: all that Lightning itself has in one goes without pickle, and comes back as pickle had it."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torchmetrics import MeanMetric

from lightning_gemini.compat import results
from lightning_gemini.data.position import PositionedLoader
from lightning_gemini.state import codec
from lightning_gemini.state.local import Boundary, Kind, LocalState

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Module(pl.LightningModule):
    """Logs in all the ways there are."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.mean = MeanMetric()
        self.extra: Any = None

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch).square().mean()
        self.mean(loss)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("most", loss, on_epoch=True, reduce_fx="max")
        self.log("all", loss, on_epoch=True, reduce_fx=sum, sync_dist=True)
        self.log("metric", self.mean)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val", self.layer(batch).mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters())
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return [optimizer], [{"scheduler": plateau, "monitor": "loss", "strict": False}]


class Capture(pl.Callback):
    """What a boundary is in the middle of an epoch, before Lightning clears what was logged."""

    def __init__(self, *, foreign: bool = True) -> None:
        self.foreign = foreign
        self.held: Any = None
        self._local: list[LocalState] = []
        self._captured: list[Any] = []

    def state_dict(self) -> dict[str, Any]:
        return {"held": self.held}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._local[:] = [LocalState(trainer, foreign=self.foreign)]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == 5:
            boundary = Boundary(Kind.EXIT, 5, {"0": 1}, {"order": [1, 0]}, (torch.ones(1), {}), [None, torch.ones(2)], {})
            self._captured[:] = [self._local[0].capture(boundary), self._pickled(boundary)]

    def _pickled(self, boundary: Boundary) -> Any:
        """The state through pickle, as of now."""
        local, memory = self._local[0], io.BytesIO()
        pickler = pickle.Pickler(memory)
        pickler.persistent_id = lambda value: local._names.get(id(value))  # type: ignore[method-assign]
        pickler.dump(boundary.state)
        memory.seek(0)
        unpickler = pickle.Unpickler(memory)
        unpickler.persistent_load = local._anchors.__getitem__  # type: ignore[method-assign]
        return unpickler.load()


def fitted(directory: Path, capture: Capture) -> pl.Trainer:
    torch.manual_seed(1)
    trainer = pl.Trainer(
        max_steps=7,
        accelerator="cpu",
        devices=1,
        val_check_interval=3,
        logger=CSVLogger(directory),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=directory,
        callbacks=[ModelCheckpoint(directory, monitor="val"), EarlyStopping("val"), LearningRateMonitor(), Timer(), capture],
    )
    data = torch.randn(28, 2)
    training = PositionedLoader(torch.utils.data.DataLoader(data, batch_size=2, shuffle=True))
    trainer.fit(Module(), training, torch.utils.data.DataLoader(data, batch_size=14))
    return trainer


def alike(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return list(a) == list(b) and all(alike(a[key], b[key]) for key in a)
    return bool(a == b)


@pytest.fixture
def capture(tmp_path: Path) -> Capture:
    capture = Capture()
    fitted(tmp_path, capture)
    return capture


def test_a_whole_state_needs_no_pickle(capture: Capture) -> None:
    data, pickled = capture._captured
    boundary = capture._local[0].decode(data)
    assert (boundary.kind, boundary.step, boundary.counters, boundary.wrapper) == (Kind.EXIT, 5, {"0": 1}, {"order": [1, 0]})
    assert boundary.kind is Kind.EXIT and alike(boundary.result[0], torch.ones(1)) and boundary.grads[0] is None
    assert list(boundary.state) == list(pickled)
    for name in ("callbacks", "callback_attributes", "schedulers", "groups", "rng", "loaders", "rows"):
        assert repr(boundary.state[name]) == repr(pickled[name]), name
    assert LocalState.logger_versions(data, foreign=True) == [0]


def test_logged_values_are_what_pickle_makes_of_them(capture: Capture) -> None:
    data, pickled = capture._captured
    loops, pickled = capture._local[0].decode(data).state["loops"], pickled["loops"]
    assert {path: loop["progress"] for path, loop in loops.items()} == {path: loop["progress"] for path, loop in pickled.items()}
    found, expected = (
        {(path, key): metric for path, loop in side.items() for key, metric in loop.get("results", {}).items()} for side in (loops, pickled)
    )
    assert len(found) >= 5 and list(found) == list(expected)
    for key, metric in found.items():
        mine, theirs = vars(metric), vars(expected[key])
        assert mine.keys() == theirs.keys() and mine["meta"] == theirs["meta"] and type(metric) is type(expected[key])
        for name in mine.keys() - {"update", "compute", "_update_signature", "meta"}:
            assert alike(mine[name], theirs[name]), f"{key} {name}"
    loss = found["fit.epoch_loop", "training_step.loss"]
    assert loss.value.item() > 0 and torch.equal(loss.compute(), expected["fit.epoch_loop", "training_step.loss"].compute())


def test_a_logged_metric_is_the_module_s_own(capture: Capture) -> None:
    local = capture._local[0]
    row = local.decode(capture._captured[0]).state["loops"]["fit.epoch_loop"]["results"]["training_step.metric"]
    assert row.value is local.model.mean


def test_what_a_process_group_was_named_for_stays_in_the_row() -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    loop = trainer.fit_loop.epoch_loop
    loop._results.log("f", "x", torch.ones(()), sync_dist=True, sync_dist_fn=max)
    metric = results.unpack(results.pack(loop._results, trainer.strategy), trainer.strategy)["f.x"]
    assert metric.meta.sync.fn is max


class Held:
    """Of a user."""


def test_a_user_s_object_is_refused_with_its_path(tmp_path: Path) -> None:
    capture = Capture()
    capture.held = {"tracker": [Held()]}
    with pytest.raises(ValueError, match=r"Held at state.callbacks\[\d\].held.tracker\[0\], which cannot be sent to another machine"):
        fitted(tmp_path, capture)


def test_on_one_node_it_is_kept(tmp_path: Path) -> None:
    capture = Capture(foreign=False)
    capture.held = Held()
    fitted(tmp_path, capture)
    data = capture._captured[0]
    boundary = capture._local[0].decode(data)
    assert any(isinstance(saved.get("held"), Held) for saved in boundary.state["callbacks"])
    capture._local[0]._foreign = True
    with pytest.raises(ValueError, match="it holds a pickle"):
        capture._local[0].decode(data)


@pytest.mark.parametrize("cut", [0, 4, 8, 20, -1])
def test_damaged_bytes(capture: Capture, cut: int) -> None:
    with pytest.raises(ValueError, match="the rank-local state"):
        capture._local[0].decode(capture._captured[0][:cut])


NO_ROW = {"state": {"loops": {"fit": {"results": {"x": (1, 2)}}}}}


@pytest.mark.parametrize("value", [[], {}, {"state": {"loops": {}}}, NO_ROW, {"state": 1}])
def test_well_formed_bytes_of_something_else(capture: Capture, value: Any) -> None:
    head = codec.encode({"logger_versions": []}, {}, foreign=True)
    data = len(head).to_bytes(8, "little") + head + codec.encode(value, {}, foreign=True)
    with pytest.raises(ValueError, match="another shape"):
        capture._local[0].decode(data)
