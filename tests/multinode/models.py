"""What the jobs on several nodes train, and how they are struck: the same script, whatever the number of nodes.

A strike is made by a rank itself, at a place that the test names: its own death, or that of its whole node (one process group), or of its
agent. A marker says that it has happened, so that whoever comes after it passes.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lightning_gemini import GeminiFSDP2Strategy, GeminiStrategy, use_mapped_data
from lightning_gemini.agent.memory import REPLICATED, reached
from tests.support.jobs import Recorder
from tests.support.models import Net, loader

_LIMIT_S = 30.0


class Struck(RuntimeError):
    """Raised by a strike of kind "raise"."""


@dataclass(frozen=True)
class Strike:
    """`where`: a hook below. `kind`: node, agent, kill, raise, stop, mark (only tell the test), or wait (for a file `go`,
    or for its end)."""

    where: str
    rank: int
    step: int
    kind: str = "node"
    after: str = ""
    """A file that must be there first, such as another strike's marker."""
    kept: bool = False
    """Only when the newest snapshot of all ranks is replicated: then no completed step may be lost."""
    always: bool = False
    """Each time, not once."""


@dataclass(frozen=True)
class Recipe:
    """A training. `kind`: ddp, fsdp, across (HSDP that replicates across nodes), within (HSDP that replicates on each node)."""

    kind: str = "ddp"
    world: int = 2
    steps: int = 4
    """Of each epoch."""
    accumulate: int = 1
    manual: bool = False
    mapped: bool = False
    epochs: int = 2
    options: dict[str, Any] = field(default_factory=dict)


class Saboteur(pl.Callback):
    """Strikes, from callbacks and from the model's own code."""

    def __init__(self, directory: Path, strikes: tuple[Strike, ...]) -> None:
        self.directory, self.strikes = directory, strikes
        self.trainer: pl.Trainer

    def __call__(self, where: str) -> None:
        """The rank is at this place."""
        for number, strike in enumerate(self.strikes):
            if (strike.where, strike.rank, strike.step) == (where, self.trainer.global_rank, self.trainer.global_step):
                marker = self.directory / f"struck-{number}"
                if (strike.always or not marker.exists()) and (not strike.after or (self.directory / strike.after).exists()):
                    self._strike(strike, marker)

    def _strike(self, strike: Strike, marker: Path) -> None:
        if strike.kept:
            self._wait_until_replicated(strike.step)
        with marker.open("a") as file:
            file.write(f"{os.getpid()}\n")
        if strike.kind == "raise":
            raise Struck(f"{strike}")
        if strike.kind == "wait":
            self._wait_for(self.directory / "go")
        if strike.kind == "node":
            os.killpg(0, signal.SIGKILL)
        elif strike.kind == "agent":
            os.kill(os.getpgrp(), signal.SIGKILL)
        elif strike.kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif strike.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)

    def _wait_for(self, file: Path) -> None:
        deadline = time.monotonic() + _LIMIT_S
        while not file.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{file} did not appear")
            time.sleep(0.005)

    def _wait_until_replicated(self, step: int) -> None:
        strategy: Any = self.trainer.strategy
        board, deadline = strategy.link.board, time.monotonic() + _LIMIT_S
        while not reached(board.get(board.job, REPLICATED), strategy.world.generation, step):
            if time.monotonic() > deadline:
                raise TimeoutError(f"step {step} was not replicated")
            time.sleep(0.001)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.trainer = trainer
        self("setup")

    def on_train_start(self, *_: Any) -> None:
        self("train_start")

    def on_train_batch_start(self, *_: Any) -> None:
        self("before_step")

    def on_train_batch_end(self, *_: Any) -> None:
        self("after_step")

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self("sanity" if trainer.sanity_checking else "validation")

    def on_train_epoch_end(self, *_: Any) -> None:
        self("epoch_end")

    def on_train_end(self, *_: Any) -> None:
        self("train_end")

    def on_fit_end(self, *_: Any) -> None:
        self("fit_end")


class Progress(pl.Callback):
    """Rank 0 tells the test how far it is; each rank, what has ended its training."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        (self.directory / f"ended{trainer.global_rank}").write_text(f"{type(exception).__name__} {trainer.global_step}")

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_rank == 0:
            draft = self.directory / "draft"
            draft.write_text(str(trainer.global_step))
            os.replace(draft, self.directory / "step")


class Model(Net):
    """`Net`, small, with places for strikes in its forward and after its optimizer's write; HSDP on request."""

    def __init__(self, recipe: Recipe, saboteur: Saboteur, per_node: int) -> None:
        super().__init__(width=192, fsdp=recipe.kind != "ddp")
        if self.fsdp:
            del self.net[5:9]  # each layer costs collectives in each step, and shows nothing new
        self.recipe, self.per_node = recipe, per_node
        self.saboteur = saboteur
        self.automatic_optimization = not recipe.manual

    def configure_model(self) -> None:
        if self.recipe.kind in ("ddp", "fsdp"):
            return super().configure_model()
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if not isinstance(self.net, FSDPModule):
            mesh = hybrid(self.recipe)
            for layer in self.net:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def configure_optimizers(self) -> Any:
        made = super().configure_optimizers()
        made["optimizer"].register_step_post_hook(lambda *_: self.saboteur("optimizer"))
        return made

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.saboteur("forward")
        loss = super().training_step(batch, batch_idx)
        if self.recipe.manual:
            optimizer, scheduler = self.optimizers(), self.lr_schedulers()
            optimizer.zero_grad()  # type: ignore[union-attr]
            self.manual_backward(loss)
            self.saboteur("manual")
            optimizer.step()  # type: ignore[union-attr]
            scheduler.step()  # type: ignore[union-attr]
        return loss


def hybrid(recipe: Recipe) -> DeviceMesh:
    """Pairs of ranks: neighbours share a shard, or each second rank does."""
    half = recipe.world // 2
    if recipe.kind == "across":
        return init_device_mesh("cpu", (half, 2), mesh_dim_names=("replicate", "shard"))
    ranks = torch.arange(recipe.world).reshape(half, 2).T.contiguous()
    return DeviceMesh("cpu", ranks, mesh_dim_names=("replicate", "shard"))


def script(directory: Path, nodes: int, per_node: int, recipe: Recipe, *strikes: Strike, **options: Any) -> Callable[[], None]:
    """A training run, as every rank of it executes it."""

    def train() -> None:
        pl.seed_everything(1)
        saboteur = Saboteur(directory, strikes)
        settings = recipe.options | options
        if any(strike.kept for strike in strikes):  # each step has a snapshot then, also where its predecessor's was slow
            settings["replication"] = {"when_behind": "wait", **settings.get("replication", {})}
        if recipe.mapped:
            use_mapped_data()
        strategy: Any = GeminiStrategy(**settings)
        if recipe.kind != "ddp":
            strategy = GeminiFSDP2Strategy(data_parallel_size=recipe.world, tensor_parallel_size=1, **settings)
        trainer = pl.Trainer(
            accelerator="cpu", devices=per_node, num_nodes=nodes, strategy=strategy, max_epochs=recipe.epochs, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, logger=False, gradient_clip_val=None if recipe.manual else 0.5,
            accumulate_grad_batches=recipe.accumulate, default_root_dir=str(directory), num_sanity_val_steps=1,
            val_check_interval=2 * recipe.accumulate, callbacks=[Recorder(str(directory)), Progress(directory), saboteur],
        )  # fmt: skip
        samples = 3 * recipe.world * recipe.steps * recipe.accumulate
        trainer.fit(Model(recipe, saboteur, per_node), loader(samples, 3), loader(2 * recipe.world, 2, shuffle=False))

    return train
