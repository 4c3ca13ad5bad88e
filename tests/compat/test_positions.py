"""Loops that are positioned go on in the very batch at which they were captured, and do nothing before it: not even a validation that was
due after the batch before, which Lightning 2.4 does when it resumes. And a checkpoint that was saved after a batch goes on with the next
one, which has the next number; Lightning 2.4 alone gives it the same again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from lightning_gemini.compat import lightning as compat

BATCHES, EPOCHS = 4, 2
VALIDATIONS: dict[str, dict[str, Any]] = {
    "in each epoch": {"val_check_interval": 2},
    "at its end": {"val_check_interval": 1.0},
    "across epochs": {"val_check_interval": 3, "check_val_every_n_epoch": None},
}


class Diary(pl.LightningModule):
    """Notes what is done; captures the loops on entering and on leaving each step, or lands in one where `landing` says so."""

    def __init__(self, landing: tuple[dict[str, Any], Any] | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.landing = landing
        self.done: list[str] = []
        self.boundaries: list[tuple[int, dict[str, Any], Any]] = []
        """For each: how much had been done, the loops, the closure's result (None on entering)."""

    def on_fit_start(self) -> None:
        if self.landing is not None:
            compat.position_loops(self.trainer, self.landing[0])

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.done.append(f"train {self.current_epoch}/{batch_idx}")
        return self.layer(batch).mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.done.append(f"validate {self.current_epoch}/{batch_idx}")

    def on_train_epoch_end(self) -> None:
        self.done.append(f"end of epoch {self.current_epoch}")

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        landing, self.landing = self.landing, None
        if landing is not None:
            loops, result = landing
            compat.restore_loops(self.trainer, loops)
            if compat.set_closure_result(optimizer_closure, result):
                return
        else:
            self.boundaries.append((len(self.done), compat.capture_loops(self.trainer), None))
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.boundaries.append((len(self.done), compat.capture_loops(self.trainer), compat.closure_result(optimizer_closure)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Finishing(SingleDeviceStrategy):
    """What ours do for a checkpoint of theirs."""

    def process_dataloader(self, dataloader: object) -> object:
        if self.lightning_module is not None and self.lightning_module.trainer.training:
            compat.finish_saved_batch(self.lightning_module.trainer)
        return super().process_dataloader(dataloader)


class Saving(pl.Callback):
    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.directory / f"{trainer.global_step}.ckpt")


def fit(module: Diary, validations: dict[str, Any], *callbacks: pl.Callback, ckpt_path: Path | None = None) -> Diary:
    trainer = pl.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", devices=1, num_sanity_val_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, strategy=Finishing("cpu"), callbacks=list(callbacks), **validations,
    )  # fmt: skip
    data = torch.utils.data.DataLoader(torch.ones(BATCHES, 2))
    trainer.fit(module, data, data, ckpt_path=ckpt_path)
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("validations", VALIDATIONS.values(), ids=list(VALIDATIONS))
def test_they_go_on_where_they_were_captured(validations: dict[str, Any]) -> None:
    undisturbed = fit(Diary(), validations)
    assert len(undisturbed.boundaries) == 2 * BATCHES * EPOCHS and any("validate" in what for what in undisturbed.done)
    for before, loops, result in undisturbed.boundaries:
        landed = fit(Diary((loops, result)), validations)
        assert landed.landing is None
        assert landed.done == undisturbed.done[before:], f"landed after {undisturbed.done[:before]}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("validations", VALIDATIONS.values(), ids=list(VALIDATIONS))
def test_a_checkpoint_goes_on_with_the_next_batch(tmp_path: Path, validations: dict[str, Any]) -> None:
    trained = [what for what in fit(Diary(), validations, Saving(tmp_path)).done if "train" in what]
    for step in range(1, BATCHES * EPOCHS + 1):
        resumed = fit(Diary(), validations, ckpt_path=tmp_path / f"{step}.ckpt")
        assert [what for what in resumed.done if "train" in what] == trained[step:], f"after step {step}"
