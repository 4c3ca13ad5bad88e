"""A model small enough for a test, and a record of the batches it was trained on."""

import hashlib
import json
import os
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn


class Tiny(L.LightningModule):
    """Predicts a byte from the one before it. Its dropout draws random numbers in each step."""

    def __init__(self, width: int = 32, lr: float = 1e-2) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Embedding(257, width), nn.Dropout(0.1), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 257))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Batches(L.Callback):
    """Writes ``<dir>/rank<r>.json`` at the end of training.

    Keys: ``batches``, from step to a hash of the batch that this rank was given; ``losses``, from step to the loss in hex; ``params``, a
    hash of the parameters at the end. (A checkpoint has rank 0's batches and losses: after a resume the steps before it are rank 0's.)
    """

    def __init__(self, dir: str) -> None:
        self.dir = dir
        self.batches: dict[int, str] = {}
        self.losses: dict[int, str] = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        self.batches[trainer.global_step] = hashlib.sha256(batch["input_ids"].numpy()).hexdigest()[:16]
        self.losses[trainer.global_step] = float(outputs["loss"]).hex()

    def state_dict(self) -> dict[str, Any]:
        return {"batches": dict(self.batches), "losses": dict(self.losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches, self.losses = dict(state_dict["batches"]), dict(state_dict["losses"])

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        sha = hashlib.sha256()
        for parameter in pl_module.parameters():
            sha.update(parameter.detach().cpu().numpy())
        record = {"batches": self.batches, "losses": self.losses, "params": sha.hexdigest()}
        os.makedirs(self.dir, exist_ok=True)
        with open(os.path.join(self.dir, f"rank{trainer.global_rank}.json"), "w") as out:
            json.dump(record, out, indent=1)
