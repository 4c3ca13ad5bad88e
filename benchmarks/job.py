"""The training script that is measured, run as users run theirs: once with our strategy, once with Lightning's plain ddp.

An MLP with dropout, AdamW, shuffled data. Every rank appends the moment and its CPU seconds of each completed step to a file. Faults are
injected by our strategy on the one side (`--faults`), by the model itself, in the same place, on the other (`--fault-steps`).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

_FEATURES = 64
_POLL_S = 0.005


class Net(pl.LightningModule):
    """`depth` square layers of `width`; `fault(step)` is called where our strategy's "forward" faults happen."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(_FEATURES, width)]
        for _ in range(depth):
            layers += [nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1)]
        self.net = nn.Sequential(*layers, nn.Linear(width, 1))
        self.fault: Callable[[int, int], None] | None = None

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.fault is not None:
            self.fault(self.global_rank, self.global_step)
        x, y = batch
        loss: torch.Tensor = nn.functional.mse_loss(self.net(x), y)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Clock(pl.Callback):
    """Appends `step, monotonic ns, CPU seconds` of this process to `steps-rank<r>.jsonl` after each completed step."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        now, usage = time.monotonic_ns(), resource.getrusage(resource.RUSAGE_SELF)
        line = json.dumps([trainer.global_step, now, usage.ru_utime + usage.ru_stime]) + "\n"
        fd = os.open(self.directory / f"steps-rank{trainer.global_rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(fd, line.encode())
        os.close(fd)


class Gate(pl.Callback):
    """Before each of `steps` the ranks wait until the benchmark has created `go-<step>`: it opens when a spare is ready, say."""

    def __init__(self, directory: Path, steps: list[int]) -> None:
        self.directory, self.steps = directory, set(steps)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step in self.steps:
            while not (self.directory / f"go-{trainer.global_step}").exists():
                time.sleep(_POLL_S)


class Injector:
    """What our strategy's `faults` do, for plain ddp: once per step of a job, restarts included; leaves the moment in `fault-<step>`."""

    def __init__(self, directory: Path, kind: str, steps: list[int], world: int) -> None:
        self.directory, self.kind, self.world, self.steps = directory, kind, world, steps

    def __call__(self, rank: int, step: int) -> None:
        if step not in self.steps or rank != self.steps.index(step) % self.world:
            return
        try:
            fd = os.open(self.directory / f"fault-{step}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return
        os.write(fd, str(time.monotonic_ns()).encode())
        if self.kind == "raise":
            raise RuntimeError(f"injected into rank {rank}, step {step}")
        os.kill(os.getpid(), signal.SIGKILL)


def parser() -> argparse.ArgumentParser:
    """The options of the job."""
    found = argparse.ArgumentParser()
    found.add_argument("--strategy", choices=("gemini", "ddp"), required=True)
    found.add_argument("--directory", type=Path, required=True)
    found.add_argument("--world", type=int, default=4)
    found.add_argument("--steps", type=int, required=True)
    found.add_argument("--width", type=int, default=512)
    found.add_argument("--depth", type=int, default=4)
    found.add_argument("--batch", type=int, default=8)
    found.add_argument("--spares", type=int, default=1)
    found.add_argument("--gates", type=json.loads, default=[])
    found.add_argument("--faults", type=json.loads, default=[])
    found.add_argument("--fault-kind", choices=("kill", "raise"), default="kill")
    found.add_argument("--fault-steps", type=json.loads, default=[])
    found.add_argument("--checkpoint-every", type=int, default=0)
    return found


def _strategy(options: argparse.Namespace) -> Any:
    if options.strategy == "ddp":
        return "ddp"
    from lightning_gemini import GeminiStrategy

    telemetry = {"directory": str(options.directory / "gemini"), "banner": False}
    return GeminiStrategy(recovery={"spares": options.spares}, telemetry=telemetry, faults=options.faults)


def train(options: argparse.Namespace) -> None:
    """Run the job in this rank."""
    pl.seed_everything(1)
    callbacks: list[pl.Callback] = [Gate(options.directory, options.gates), Clock(options.directory)]
    if options.checkpoint_every:
        every = options.checkpoint_every
        callbacks.append(ModelCheckpoint(options.directory, "last", every_n_train_steps=every, enable_version_counter=False))
    model = Net(options.width, options.depth)
    if options.fault_steps:
        model.fault = Injector(options.directory, options.fault_kind, options.fault_steps, options.world)
    count = options.steps * options.batch * options.world
    generator = torch.Generator().manual_seed(2)
    data = TensorDataset(torch.rand(count, _FEATURES, generator=generator), torch.rand(count, 1, generator=generator))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=options.world,
        strategy=_strategy(options),
        max_steps=options.steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=bool(options.checkpoint_every),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=options.directory,
    )
    last = options.directory / "last.ckpt"
    trainer.fit(model, DataLoader(data, options.batch, shuffle=True), ckpt_path=last if last.exists() else None)


if __name__ == "__main__":
    train(parser().parse_args())
