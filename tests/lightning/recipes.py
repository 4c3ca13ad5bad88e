"""Small trainings, each with a group of Lightning's features. Every one takes a directory, a strategy (ours, or "ddp") and strikes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, IterableDataset

from tests.lightning.sabotage import Saboteur, Strike
from tests.support.jobs import Recorder
from tests.support.models import Net, Noisy, loader

WORLD = 3


def trainer(directory: Path, strategy: Any, *callbacks: pl.Callback, **kwargs: Any) -> pl.Trainer:
    settings: dict[str, Any] = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0} | kwargs
    pl.seed_everything(1)
    return pl.Trainer(
        accelerator="cpu", devices=WORLD, strategy=strategy, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=str(directory), callbacks=[*callbacks, Recorder(str(directory))], **settings,
    )  # fmt: skip


class Struck(Net):
    """`Net` that asks the saboteur in its steps."""

    def __init__(self, saboteur: Saboteur, width: int = 64) -> None:
        super().__init__(width)
        self.saboteur = saboteur

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.saboteur("training", self.global_rank, self.trainer.fit_loop.total_batch_idx)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.saboteur("validation", self.global_rank)
        super().validation_step(batch, batch_idx)


# ---- gradient accumulation, clipping, bf16-mixed, sync_dist on_step, validation in mid-epoch, a scheduler per step


class Accumulating(Struck):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("mean_loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss  # type: ignore[no-any-return]


def accumulating(directory: Path, strategy: Any, *strikes: Strike) -> None:
    """8 batches per epoch: optimizer steps after batches 2, 5 and 7."""
    model = Accumulating(Saboteur(directory, strikes), width=512)
    settings = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5, "precision": "bf16-mixed", "val_check_interval": 4}
    trainer(directory, strategy, **settings).fit(model, loader(), loader(24, shuffle=False))


# ---- a gradient scaler (on the CPU), with overflows


class Overflowing(Struck):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) * (1e38 if batch_idx == 2 else 1)  # type: ignore[no-any-return]

    def on_before_zero_grad(self, optimizer: Any) -> None:
        scaler = self.trainer.precision_plugin.scaler  # type: ignore[attr-defined]
        self.log("scale", float(scaler.get_scale()))


def scaling(directory: Path, strategy: Any, *strikes: Strike) -> None:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", growth_interval=2))
    trainer(directory, strategy, plugins=[plugin], gradient_clip_val=0.5).fit(Overflowing(Saboteur(directory, strikes)), loader())


# ---- manual optimization: two optimizers, two writes per batch; the generator gathers gradients over two batches


class Gan(Struck):
    def __init__(self, saboteur: Saboteur) -> None:
        super().__init__(saboteur)
        self.automatic_optimization = False
        self.critic = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 1))

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, torch.Tensor]:
        first, second = self.optimizers()  # type: ignore[misc]
        self.saboteur("training", self.global_rank, self.trainer.fit_loop.total_batch_idx)
        x, y = batch
        self.toggle_optimizer(first)
        generated = mse_loss(self.critic(self.net(x)), torch.ones_like(y))
        self.manual_backward(generated / 2)
        if batch_idx % 2:
            first.step()
            first.zero_grad()
            self.lr_schedulers().step()  # type: ignore[union-attr, call-arg]
        self.untoggle_optimizer(first)
        self.saboteur("between writes", self.global_rank, self.trainer.fit_loop.total_batch_idx)
        self.toggle_optimizer(second)
        loss = mse_loss(self.critic(self.net(x).detach()), torch.zeros_like(y)) + mse_loss(self.critic(y), torch.ones_like(y))
        second.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(second, gradient_clip_val=0.5)
        second.step()
        self.untoggle_optimizer(second)
        self.log("generated", generated, on_step=True, on_epoch=True)
        return {"loss": loss.detach() + generated.detach()}

    def configure_optimizers(self) -> Any:
        first = torch.optim.Adam(self.net.parameters(), lr=1e-3)
        second = torch.optim.SGD(self.critic.parameters(), lr=1e-2, momentum=0.9)
        return [first, second], [torch.optim.lr_scheduler.StepLR(first, 2, 0.9)]


def gan(directory: Path, strategy: Any, *strikes: Strike) -> None:
    trainer(directory, strategy).fit(Gan(Saboteur(directory, strikes)), loader())


# ---- unused parameters, all_gather with gradients, overfit_batches, max_steps, data that has no length, loader workers, a .ckpt


class Choosing(Struck):
    """One of its two heads is used, in turn; the loss mixes the outputs of all ranks."""

    def __init__(self, saboteur: Saboteur) -> None:
        super().__init__(saboteur)
        self.heads = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.saboteur("training", self.global_rank, self.trainer.fit_loop.total_batch_idx)
        x, y = batch
        out = self.heads[batch_idx % 2](self.net(x))
        everyone = self.all_gather(out, sync_grads=True)
        return mse_loss(out, y) + everyone.var()  # type: ignore[no-any-return, union-attr]


def choosing(directory: Path, strategy: Any, *strikes: Strike) -> None:
    settings = {"max_steps": 9, "max_epochs": -1, "overfit_batches": 4}
    trainer(directory, strategy, **settings).fit(Choosing(Saboteur(directory, strikes)), loader())


class Stream(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """Without a length, random, another part for each rank and worker."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        info = torch.utils.data.get_worker_info()
        for _ in range(16 if info else 32):
            x = torch.rand(16) + self.rank + (info.id if info else 0)
            yield x, x.sum(0, keepdim=True).sin()


class Streaming(Struck):
    def __init__(self, saboteur: Saboteur, workers: int) -> None:
        super().__init__(saboteur)
        self.workers = workers

    def train_dataloader(self) -> Any:
        return DataLoader(Stream(self.global_rank), batch_size=4, num_workers=self.workers)


def streaming(directory: Path, strategy: Any, *strikes: Strike) -> None:
    settings = {"limit_train_batches": 6, "val_check_interval": 3}
    trainer(directory, strategy, **settings).fit(Streaming(Saboteur(directory, strikes), 0), val_dataloaders=loader(24, shuffle=False))


def streaming_with_workers(directory: Path, strategy: Any, *strikes: Strike) -> None:
    trainer(directory, strategy).fit(Streaming(Saboteur(directory, strikes), 2))


class Quiet(Noisy):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[index], self.x[index].sum(0, keepdim=True).sin()


def workers(directory: Path, strategy: Any, *strikes: Strike) -> None:
    data = DataLoader(Quiet(96), batch_size=4, shuffle=True, num_workers=2, persistent_workers=True)
    trainer(directory, strategy).fit(Struck(Saboteur(directory, strikes)), data)


def resumed(directory: Path, strategy: Any, *strikes: Strike) -> None:
    """`directory.parent / "first.ckpt"` is there already."""
    model = Struck(Saboteur(directory, strikes))
    path = str(directory.parent / "first.ckpt")
    trainer(directory, strategy, max_epochs=3).fit(model, loader(), loader(24, shuffle=False), ckpt_path=path)


def first(directory: Path, strategy: Any) -> None:
    """The run that `resumed` goes on from."""
    fitting = trainer(directory, strategy, max_epochs=1)
    fitting.fit(Struck(Saboteur(directory, ())), loader(), loader(24, shuffle=False))
    fitting.save_checkpoint(directory.parent / "first.ckpt")
