"""Training loaders of a Trainer become mapped ones.

Seam: `use_mapped_data(…)` for the whole process (what `+data=mmap` calls), or `MMapDataModule` for one Trainer. Both rest on two public
methods of Lightning's `Strategy` that every Trainer calls, whatever the strategy: `process_dataloader`, after Lightning has put its
distributed sampler into the loader, and `teardown`.

Failure: an option that is wrong is one `ValueError` before anything is wrapped. Loaders of validation and test stay as they are.
"""

from __future__ import annotations

import functools
import logging
import os
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import Strategy

from lightning_gemini import checks
from lightning_gemini.compat import lightning as compat
from lightning_gemini.config import DataConfig, parse
from lightning_gemini.data.position import PositionedLoader
from lightning_gemini.mapped.files import new_key
from lightning_gemini.mapped.forking import Owner
from lightning_gemini.mapped.loader import MappedLoader, Stream

log = logging.getLogger(__name__)


class _Process:
    """What this process has of it."""

    config: DataConfig | None = None
    job = uuid.uuid4().hex
    loaders: dict[MappedLoader, int] = {}
    """Those that read, with the epoch in which each was made."""


def use_mapped_data(**options: Any) -> None:
    """Keep the training batches of every Trainer of this process in memory that outlives a rank.

    Args:
        options: fields of `lightning_gemini.DataConfig`.

    Raises:
        ValueError: an option is unknown or wrong.
    """
    _Process.config = checked(options)
    install()


def checked(options: Mapping[str, Any] | DataConfig | None) -> DataConfig:
    """The options, once what they need is there."""
    config = parse(DataConfig, options, "mapped_data")
    if config.directory is not None:
        checks.writable(config.directory, "mapped_data.directory")
    if config.encryption:
        new_key()
    return config


def install() -> None:
    """Make every Strategy ask here."""
    original_process, original_teardown = Strategy.process_dataloader, Strategy.teardown
    if getattr(original_process, "lightning_gemini", False):
        return

    @functools.wraps(original_process)
    def process_dataloader(self: Strategy, dataloader: object) -> object:
        return _wrapped(self, original_process(self, dataloader))

    @functools.wraps(original_teardown)
    def teardown(self: Strategy) -> None:
        close_all()
        original_teardown(self)

    process_dataloader.lightning_gemini = True  # type: ignore[attr-defined]
    Strategy.process_dataloader, Strategy.teardown = process_dataloader, teardown  # type: ignore[method-assign]


def close_all(*, bye: bool = True) -> None:
    """Training is over: no loader process is needed. Without `bye` this process is about to read from them again."""
    while _Process.loaders:
        _Process.loaders.popitem()[0].close(bye=bye)


def _close_before(epoch: int) -> None:
    """Loaders that the Trainer has replaced since (reload_dataloaders_every_n_epochs)."""
    for loader in [loader for loader, made in _Process.loaders.items() if made < epoch]:
        del _Process.loaders[loader]
        loader.close()


def _wrapped(strategy: Strategy, loader: object) -> object:
    trainer: pl.Trainer | None = getattr(strategy.lightning_module, "_trainer", None)
    if trainer is None or not trainer.training or isinstance(loader, PositionedLoader):
        return loader
    config = _config(trainer)
    if config is None:
        return loader
    make_owner: Callable[[], Owner] | None = getattr(strategy, "loader_owner", None)
    owner = make_owner() if make_owner is not None else Owner(os.getpid())
    mapped = MappedLoader(loader, config, _stream(trainer, config, recovers=make_owner is not None), owner)
    _close_before(trainer.current_epoch - 1)
    _Process.loaders[mapped] = trainer.current_epoch
    return mapped


def _config(trainer: pl.Trainer) -> DataConfig | None:
    return getattr(trainer.datamodule, "mapped_config", None) or _Process.config  # type: ignore[attr-defined]


def set_up_ahead(trainer: pl.Trainer) -> None:
    """In a spare that waits for a rank: `setup` of the data module, now if that is wanted, and then not again.

    What it raises here (data that rank 0 is still preparing) it may raise again when its turn comes; nobody waits for a spare.
    """
    module, config = trainer.datamodule, _config(trainer)  # type: ignore[attr-defined]
    if module is None or config is None or not config.setup_ahead:
        return
    reset_seed()  # as in every rank before its `setup`
    try:
        module.setup("fit")
    except Exception as error:
        log.warning("mapped_data.setup_ahead: setup raised %s: %s; it is run again when this spare is needed", type(error).__name__, error)
        return
    original = module.setup

    def setup(stage: str) -> None:
        if stage == "fit":
            module.setup = original
        else:
            original(stage)

    module.setup = setup


def _stream(trainer: pl.Trainer, config: DataConfig, *, recovers: bool) -> Stream:
    """Ranks of a node with the same place among the data-parallel ones read the same data."""
    rank, replicas = _data_parallel(trainer.strategy, trainer)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", trainer.num_devices))
    ranks = min(trainer.world_size // replicas, local) if config.share else 1
    own_job = _Process.job if ranks == 1 else _common_name()
    job = os.environ["LIGHTNING_GEMINI_JOB"] if recovers else own_job
    return Stream(
        name=f"{job}/{rank if ranks > 1 else f'{rank}.{trainer.global_rank}'}",
        member=trainer.global_rank,
        ranks=ranks,
        ahead=lambda: compat.read_ahead(trainer),
        epoch_is_over=lambda: trainer.is_last_batch,
        interrupted_at=lambda: compat.interrupted_at(trainer),
        resumed=lambda: compat.finish_saved_batch(trainer),
        settled=lambda: _close_before(min(trainer.current_epoch, max(_Process.loaders.values(), default=0))),
    )


def _data_parallel(strategy: Strategy, trainer: pl.Trainer) -> tuple[int, int]:
    settings = getattr(strategy, "distributed_sampler_kwargs", None) or {}
    return int(settings.get("rank", trainer.global_rank)), int(settings.get("num_replicas", trainer.world_size))


def _common_name() -> str:
    """For ranks that no agent has named a job for: what their launcher has told all of them."""
    return "-".join(os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "MASTER_ADDR", "MASTER_PORT"))
