"""A model that is sharded where the strategy has a mesh, and a callback that says how far it is."""

import hashlib
import json
import os
import time
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Tiny(L.LightningModule):
    """A few layers on random numbers. Its dropout draws random numbers in each step."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def configure_model(self) -> None:
        if self.device_mesh is None:
            return
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if not isinstance(self.net, FSDPModule):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(7)
        x = torch.rand(4096, 16, generator=generator)
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=8, shuffle=True)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Losses(L.Callback):
    """Rank 0 keeps its loss of each step, says every tenth, and writes ``<dir>/losses.json`` at the end: hex, and a hash of all."""

    def __init__(self, dir: str, step_s: float) -> None:
        self.dir, self.step_s = dir, step_s
        self.losses: dict[int, str] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses[trainer.global_step] = float(outputs["loss"]).hex()
        if trainer.is_global_zero and trainer.global_step % 10 == 0:
            print(f"step {trainer.global_step}: loss {float(outputs['loss']):.4f} (process {os.getpid()})", flush=True)
        time.sleep(self.step_s)  # work that a real model would have

    def state_dict(self) -> dict[str, Any]:
        return {"losses": dict(self.losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses = dict(state_dict["losses"])

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            os.makedirs(self.dir, exist_ok=True)
            with open(os.path.join(self.dir, "losses.json"), "w") as out:
                json.dump({"losses": self.losses, "hash": hashlib.sha256(repr(self.losses).encode()).hexdigest()}, out, indent=1)
