"""`MMapDataModule`: any LightningDataModule or DataLoader, its training batches kept in memory that outlives a rank.

Seam: a LightningDataModule that is the wrapped one in all but this: it marks its Trainer's training loaders for `mapped.trainer`. With a
plain strategy it gives exact resumption in the middle of an epoch; with ours also the first batch of a replaced rank in milliseconds.
"""

from __future__ import annotations

import functools
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_gemini.config import DataConfig
from lightning_gemini.mapped.trainer import checked, install

_HOOKS = [name for name in dir(pl.LightningDataModule) if not name.startswith("_") and callable(getattr(pl.LightningDataModule, name))]


class MMapDataModule(pl.LightningDataModule):
    """See the module's docstring.

    Args:
        datamodule: a LightningDataModule, or the training data: whatever `Trainer.fit` takes as `train_dataloaders`.
        val_dataloaders: with training data, what `Trainer.fit` takes under that name.
        options: fields of `lightning_gemini.DataConfig`: prefetch_length, lookback_length, directory, size_limit_mib, encryption, share.

    Raises:
        ValueError: an option is unknown or wrong, or loaders of validation are given twice.
    """

    def __init__(self, datamodule: Any, val_dataloaders: Any = None, **options: Any) -> None:
        super().__init__()
        self.mapped_config: DataConfig = checked(options)
        install()
        if not isinstance(datamodule, pl.LightningDataModule):
            datamodule = _Loaders(datamodule, val_dataloaders)
        elif val_dataloaders is not None:
            raise ValueError("val_dataloaders: the datamodule has its own; leave it out")
        self.wrapped: pl.LightningDataModule = datamodule
        for name in _HOOKS:  # Lightning asks which of them exist, so only those do
            if is_overridden(name, datamodule, parent=pl.LightningDataModule):
                setattr(self, name, getattr(datamodule, name))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a process that was spawned."""
        self.__dict__.update(state)
        install()

    def __getattr__(self, name: str) -> Any:
        if name == "wrapped":
            raise AttributeError(name)
        return getattr(self.wrapped, name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "trainer" and "wrapped" in vars(self):
            self.wrapped.trainer = value


class _Loaders(pl.LightningDataModule):
    """Loaders as a data module."""

    def __init__(self, train: Any, val: Any) -> None:
        super().__init__()
        self.train_dataloader = functools.partial(_given, train)  # type: ignore[method-assign]
        if val is not None:
            self.val_dataloader = functools.partial(_given, val)  # type: ignore[method-assign]


def _given(loaders: Any) -> Any:
    return loaders
