"""What the data modules have in common: settings, windows, loaders.

Seam: a subclass gives `_store(role)`, the tokens of `train` or `val`. Lightning calls `prepare_data` once per node, `setup` on every rank.
The order of the samples is a function of `seed` and the epoch alone: the same on one process and after a restart, independent of any
generator's state. Under a distributed strategy each rank gets its share; Lightning tells the sampler the epoch.

States: made -> set up; `setup` may be called again. Failures: a bad setting is one `ValueError` when the module is made; too few tokens
for one sample is one in `setup`.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, DistributedSampler

from lightning_gemini.datasets.settings import flag, require, whole
from lightning_gemini.datasets.store import TokenStore
from lightning_gemini.datasets.windows import TokenWindows

log = logging.getLogger(__name__)

Samples = dict[str, torch.Tensor]


class WindowsDataModule(pl.LightningDataModule):
    """Batches of `input_ids` and `labels`, each of `sequence_length` tokens."""

    def __init__(
        self,
        *,
        train: Any,
        val: Any = None,
        sequence_length: int,
        batch_size: int = 1,
        num_workers: int = 0,
        shuffle: bool = True,
        seed: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__()
        whole("sequence_length", sequence_length, 1)
        whole("batch_size", batch_size, 1)
        whole("num_workers", num_workers, 0)
        whole("seed", seed, 0)
        flag("shuffle", shuffle)
        flag("pin_memory", pin_memory)
        require(train is not None, "train", train, "say where the training data is")
        self.sources = {"train": train} if val is None else {"train": train, "val": val}
        self.sequence_length, self.batch_size, self.num_workers = sequence_length, batch_size, num_workers
        self.shuffle, self.seed, self.pin_memory = shuffle, seed, pin_memory
        self._windows: dict[str, TokenWindows] = {}
        if val is None and type(self).val_dataloader is WindowsDataModule.val_dataloader:
            # Lightning's own, as if there were none here: it would warn of a validation without data, or of data without a validation.
            self.val_dataloader = partial(pl.LightningDataModule.val_dataloader, self)  # type: ignore[method-assign]

    def _store(self, role: str) -> TokenStore:
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        for role in self.sources:
            if role not in self._windows:
                self._windows[role] = self._made(role)

    def _made(self, role: str) -> TokenWindows:
        windows = TokenWindows(self._store(role), self.sequence_length)
        remedy = f"{windows.token_count} tokens, one sample needs {self.sequence_length + 1}: give more data or a shorter sequence_length"
        require(len(windows) > 0, role, self.sources[role], remedy)
        log.info("%s: %d tokens, %d samples", role, windows.token_count, len(windows))
        return windows

    def train_dataloader(self) -> DataLoader[Samples]:
        return self._loader("train", self.shuffle)

    def val_dataloader(self) -> Any:
        return self._loader("val", False) if "val" in self.sources else []

    def _loader(self, role: str, shuffle: bool) -> DataLoader[Samples]:
        windows = self._windows[role]
        share = (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {"num_replicas": 1, "rank": 0}
        sampler: DistributedSampler[Samples] = DistributedSampler(windows, **share, shuffle=shuffle, seed=self.seed)
        return DataLoader(
            cast("torch.utils.data.Dataset[Samples]", windows),
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
        )
