"""A model with everything that makes bit-identity hard: several DDP buckets, dropout, BatchNorm, shuffling, clipping, schedulers."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Noisy(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Samples that depend on their index and on the global generator, as augmented data does."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.rand(size, 16, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.x[index] + 0.01 * torch.rand(16)
        return x, x.sum(0, keepdim=True).sin()


class Net(pl.LightningModule):
    """Several buckets of gradients (about 4 MB)."""

    def __init__(self, width: int = 512, fsdp: bool = False) -> None:
        super().__init__()
        self.fsdp = fsdp
        layers: list[nn.Module] = [nn.Linear(16, width), nn.Dropout(0.2)]
        layers += [nn.LayerNorm(width)] if fsdp else [nn.BatchNorm1d(width)]
        for _ in range(3):
            layers += [nn.Linear(width, width), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, 1))
        self.seen = 0

    def configure_model(self) -> None:
        if self.fsdp and self.device_mesh is not None:
            from torch.distributed.fsdp import FSDPModule, fully_shard

            if not isinstance(self.net, FSDPModule):
                for layer in self.net:
                    if isinstance(layer, nn.Linear):
                        fully_shard(layer, mesh=self.device_mesh["data_parallel"])
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.seen += len(x)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.mse_loss(self.net(x), y), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9), "interval": "step"},
        }


def loader(size: int = 96, batch: int = 4, shuffle: bool = True, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(Noisy(size), batch_size=batch, shuffle=shuffle, **kwargs)
