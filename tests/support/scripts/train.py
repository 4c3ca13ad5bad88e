"""An ordinary user's script; a callback of it kills one rank once."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
import lightning_gemini
from tests.support.jobs import Recorder
from tests.support.models import Net, loader


class Suicide(pl.Callback):
    def __init__(self, directory: str) -> None:
        self.marker = Path(directory) / "died"

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 5 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def run(directory: str, strategy: Any, *callbacks: pl.Callback) -> None:
    torch.set_num_threads(1)
    pl.seed_everything(1)
    trainer = pl.Trainer(
        strategy=strategy, callbacks=[Recorder(directory), Suicide(directory), *callbacks], accelerator="cpu", devices=2, max_epochs=1,
        default_root_dir=directory, enable_progress_bar=False, logger=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Net(width=64), loader())


if __name__ == "__main__":
    run(sys.argv[1], "gemini", lightning_gemini.GeminiCallback())
