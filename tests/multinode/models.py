"""What the jobs on several nodes train: the same script, whatever the number of nodes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_gemini import GeminiFSDP2Strategy, GeminiStrategy
from tests.support.jobs import Recorder
from tests.support.models import Net, loader


class Steps(pl.Callback):
    """Rank 0 tells the test how far it is; `pace_s` gives the test time to do something in a step."""

    def __init__(self, directory: Path, gate: Path | None = None) -> None:
        self.directory, self.gate = directory, gate

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        draft = self.directory / f"step.{trainer.global_rank}"
        draft.write_text(str(trainer.global_step))
        if trainer.global_rank == 0:
            os.replace(draft, self.directory / "step")


def script(directory: Path, nodes: int, per_node: int, *, fsdp: bool, epochs: int = 2, **options: Any) -> Callable[[], None]:
    """A training run, as every rank of it executes it."""

    def train() -> None:
        pl.seed_everything(1)
        world = nodes * per_node
        kind = GeminiFSDP2Strategy if fsdp else GeminiStrategy
        if fsdp:
            options.update(data_parallel_size=world, tensor_parallel_size=1)
        trainer = pl.Trainer(
            accelerator="cpu", devices=per_node, num_nodes=nodes, strategy=kind(**options), max_epochs=epochs, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, logger=False, gradient_clip_val=0.5, default_root_dir=str(directory),
            callbacks=[Recorder(str(directory)), Steps(directory)], num_sanity_val_steps=1, val_check_interval=3,
        )  # fmt: skip
        trainer.fit(Net(fsdp=fsdp), loader(), loader(24, shuffle=False))

    return train
