"""What is refused, before the first step: each with one error that names the key, the value and the remedy."""

from __future__ import annotations

import inspect
import os
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn.parallel import DistributedDataParallel

from lightning_gemini import versions
from lightning_gemini.placement import place
from lightning_gemini.state.catalogue import Entry, layout


def known_arguments(strategy: str, kwargs: dict[str, Any], *takers: type) -> None:
    """Keyword arguments that none of `takers`, DDPStrategy or DistributedDataParallel knows are typos."""
    classes = (*takers, DDPStrategy, DistributedDataParallel)
    known = set[str]().union(*(inspect.signature(taker).parameters for taker in classes))
    known -= {"kwargs", "module", "process_group", "cluster_environment"}
    for key in kwargs:
        if key not in known:
            raise ValueError(f"unknown key {key!r}={kwargs[key]!r} for {strategy}: known keys are snapshot, recovery, telemetry, "
                             f"replication, membership, persistent, faults, {', '.join(sorted(known))}")  # fmt: skip


def ddp_arguments(kwargs: dict[str, Any]) -> None:
    """What `GeminiStrategy` takes."""
    known_arguments("GeminiStrategy", kwargs)
    if kwargs.get("static_graph"):
        raise ValueError("static_graph=True is not supported: a repeated step is a second graph to DDP; leave it out")
    if kwargs.get("start_method", "popen") != "popen":
        raise ValueError(f"start_method={kwargs['start_method']!r} is not supported: the agent starts the ranks; leave it out")


def world_of(strategy: Any) -> int:
    """The number of ranks; one cannot be recovered by others."""
    world: int = strategy.num_nodes * strategy.num_processes
    if world < 2:
        raise ValueError(f"devices={world} leaves nobody to recover from: set Trainer(devices=2) or more, or use strategy='auto'")
    if strategy.num_nodes > 1:
        place([""] * strategy.num_nodes, strategy.config.replication.copies)
    return world


def same_world(strategy: Any, world: int, per_node: int) -> None:
    """What the agent was started with, and the Trainer's numbers."""
    if per_node != strategy.num_processes:
        raise ValueError(f"devices={strategy.num_processes} differs from --nproc-per-node={per_node}: give both the same number")
    if world != world_of(strategy):
        raise ValueError(f"num_nodes={strategy.num_nodes} differs from --nnodes={world // per_node}: give both the same number")


def writable(directory: str, key: str) -> None:
    """The directory can be made and written."""
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{key}={directory!r} cannot be made ({error.strerror}): give a directory that can be written") from None
    if not os.access(directory, os.W_OK):
        raise ValueError(f"{key}={directory!r} cannot be written: give a directory that can be written")


def trainer(strategy: Any, trainer_: pl.Trainer) -> None:
    """Trainer settings that cannot be repeated in place, and options of ours that leave nothing to recover from."""
    for sentence in versions.untested():
        rank_zero_warn(sentence)
    if not strategy.has_donors() and not strategy.config.snapshot.every_n_steps and not strategy.config.persistent.url:
        raise ValueError(
            f"snapshot.every_n_steps=0 with {strategy.strategy_name} leaves nothing to recover from: a rank's shards are in no other rank "
            "of its node; give a cadence of 1 or more, or a persistent.url"
        )
    if not strategy.replicated and trainer_.accumulate_grad_batches > 1:
        raise ValueError(
            f"accumulate_grad_batches={trainer_.accumulate_grad_batches} with gemini_fsdp2 is not supported: FSDP2 communicates in every "
            "micro-batch, which could not be repeated alone; use a larger batch, or strategy='gemini'"
        )


def optimizer(optimizer_: torch.optim.Optimizer) -> None:
    """An optimizer whose state can be read and put back, and that writes after its closure."""
    if not isinstance(optimizer_, torch.optim.Optimizer):
        raise ValueError(
            f"optimizer {type(optimizer_).__name__} has no torch.optim.Optimizer interface (state_dict, state): it cannot be restored"
        )
    if isinstance(optimizer_, torch.optim.LBFGS):
        raise ValueError("optimizer LBFGS runs its closure several times between writes, which cannot be repeated: use another optimizer")
    try:
        optimizer_.state_dict()
    except Exception as error:
        raise ValueError(
            f"optimizer {type(optimizer_).__name__}.state_dict() failed ({error}): it cannot be restored; use another optimizer"
        ) from error


def same_layout(entries: list[Entry], replicated: bool) -> None:
    """All ranks hold the same parameters, in name, shape and dtype; with DDP in value too, which DDP itself sees to."""
    mine = layout(entries) if replicated else [(entry.name, [], str(entry.tensor.dtype)) for entry in entries]
    others: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(others, mine)
    for rank, theirs in enumerate(others):
        if theirs == others[0]:
            continue
        difference = next((pair for pair in zip(others[0], theirs, strict=False) if pair[0] != pair[1]), (len(others[0]), len(theirs)))
        raise ValueError(
            f"rank {rank} does not hold the same parameters as rank 0: {difference[1]}, not {difference[0]}; "
            "build the model alike on all ranks"
        )
