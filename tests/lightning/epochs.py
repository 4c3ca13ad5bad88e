"""Trainings whose features act at the ends of epochs and validations: checkpoints, loggers, metrics, stopping, testing."""

from __future__ import annotations

import contextlib
import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torchmetrics.regression import MeanAbsoluteError

from tests.lightning.recipes import Struck, trainer
from tests.lightning.sabotage import Saboteur, Strike
from tests.support.models import loader


class Counting(pl.Callback):
    """State that no optimizer knows: one counter in `state_dict`, one that is merely an attribute. Both change the parameters."""

    def __init__(self) -> None:
        self.kept = 0
        self.plain = 0

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.kept = state_dict["kept"]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.kept += 1
        self.plain += 1
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.clamp_(-0.3, 0.3)
            if self.kept % 3 == 0:
                next(pl_module.parameters()).mul_(1 - 0.001 * self.plain)


class Checkpoint(ModelCheckpoint):
    """Asks the saboteur before and after each save on rank 0."""

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        saboteur = trainer.lightning_module.saboteur
        saboteur("before save", trainer.global_rank)
        super()._save_checkpoint(trainer, filepath)
        saboteur("after save", trainer.global_rank)


class Rich(Struck):
    """torchmetrics over the epoch, plain attributes that matter, plateau and epoch schedulers' hooks."""

    def __init__(self, saboteur: Saboteur, monitor: bool = False) -> None:
        super().__init__(saboteur)
        self.error = MeanAbsoluteError()
        self.val_error = MeanAbsoluteError()
        self.monitor = monitor
        self.history: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        x, y = batch
        self.error(self.net(x).detach(), y)
        self.log("mae", self.error, on_step=True, on_epoch=True)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        self.history = [*self.history[-3:], float(loss.detach())]
        return loss * (1 + 0.01 * (self.seen % 7)) + 0.001 * sum(self.history)  # type: ignore[no-any-return]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        x, y = batch
        self.val_error.update(self.net(x), y)
        self.log("val_mae", self.val_error)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.saboteur("test", self.global_rank)
        x, y = batch
        self.log("test_loss", nn.functional.mse_loss(self.net(x), y), sync_dist=True)

    def on_train_epoch_end(self) -> None:
        self.saboteur("epoch end", self.global_rank, self.current_epoch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        if self.monitor:
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss", "interval": "epoch"}}
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def monitored(directory: Path, strategy: Any, *strikes: Strike) -> None:
    """Top-2 checkpoints and last, CSV rows, plateau scheduler, early stopping (in epoch 3 of 6), two validations per epoch."""
    saboteur = Saboteur(directory, strikes)
    saving = Checkpoint(monitor="val_loss", save_top_k=2, save_last=True, filename="{epoch}-{step}", dirpath=directory / "checkpoints")
    stopping = EarlyStopping("val_loss", patience=4, min_delta=0.5)
    settings: dict[str, Any] = {"max_epochs": 6, "enable_checkpointing": True, "val_check_interval": 4, "log_every_n_steps": 1,
                                "logger": CSVLogger(str(directory), flush_logs_every_n_steps=5)}  # fmt: skip
    fitting = trainer(directory, strategy, saving, stopping, **settings)
    fitting.fit(Rich(saboteur, monitor=True), loader(), loader(24, shuffle=False))


def counted(directory: Path, strategy: Any, *strikes: Strike) -> None:
    """Callbacks with state, weights clamped outside the optimizer, torchmetrics, `trainer.test` after `fit`."""
    fitting = trainer(directory, strategy, Counting())
    model = Rich(Saboteur(directory, strikes))
    fitting.fit(model, loader(), loader(24, shuffle=False))
    (results,) = fitting.test(model, loader(36, shuffle=False), verbose=False)
    path = directory / f"rank{fitting.global_rank}.json"
    record = json.loads(path.read_text()) | {"test": results, "seen": model.seen, "history": model.history}
    path.write_text(json.dumps(record))


class Watch(pl.Callback):
    """Writes down what the Timer has counted at the end of training, and how long it has lasted since this rank's first start."""

    def __init__(self, timer: Timer) -> None:
        self.timer = timer

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with contextlib.suppress(FileExistsError), Path(trainer.default_root_dir, f"started{trainer.global_rank}").open("x") as file:
            file.write(str(time.monotonic()))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        started = float(Path(trainer.default_root_dir, f"started{trainer.global_rank}").read_text())
        record = {"elapsed": self.timer.time_elapsed(), "lasted": time.monotonic() - started, "steps": trainer.global_step}
        Path(trainer.default_root_dir, f"timer{trainer.global_rank}.json").write_text(json.dumps(record))


class Slow(Struck):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        time.sleep(0.05)
        return super().training_step(batch, batch_idx)  # type: ignore[no-any-return]


def timed(directory: Path, strategy: Any, *strikes: Strike) -> None:
    """Ends after three seconds, about step 50 on an idle machine."""
    timer = Timer(timedelta(seconds=3))
    trainer(directory, strategy, timer, Watch(timer), max_epochs=-1).fit(Slow(Saboteur(directory, strikes)), loader())
