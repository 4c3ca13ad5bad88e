"""The training on several nodes that is measured: an MLP with AdamW under FSDP2, DDP or HSDP.

Every rank appends a `Mark` for each completed step, and tells at the end what its state weighs. `nodes_site` starts it and reads that.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import psutil
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.job import Gate
from lightning_gemini import GeminiFSDP2Strategy, GeminiStrategy
from lightning_gemini.agent.memory import REPLICATED, reached
from tests.multinode.models import Recipe as Layout
from tests.multinode.models import hybrid

FEATURES = 64
_LIMIT_S = 120.0
_POLL_S = 0.001


@dataclass(frozen=True, slots=True)
class Recipe:
    """A training. `kind`: ddp, fsdp, across (HSDP that replicates across nodes), within (HSDP that replicates on each node)."""

    kind: str = "fsdp"
    nodes: int = 2
    per_node: int = 1
    width: int = 256
    depth: int = 4
    batch: int = 4
    steps: int = 10
    gates: tuple[int, ...] = ()
    """Before these steps the ranks wait until the benchmark lets them go on. What they then have is captured, whatever the options."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of our strategy."""

    @property
    def world(self) -> int:
        """Ranks."""
        return self.nodes * self.per_node


class Mark(NamedTuple):
    """A completed step of a rank: when its optimizer had written, and when all was done; CPU seconds of the process until then."""

    step: int
    wrote_ns: int
    wrote_cpu_s: float
    done_ns: int
    done_cpu_s: float
    agent_cpu_s: float
    """Of the node's agent until `done_ns`; 0 without one."""


class Meter(pl.Callback):
    """Writes the marks of this rank, and at the end what its state weighs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.wrote = (0, 0.0)

    def written(self, *_: Any) -> None:
        """Post-hook of the optimizer."""
        self.wrote = time.monotonic_ns(), time.process_time()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        link = getattr(trainer.strategy, "link", None)
        spent = psutil.Process(link.agent_pid).cpu_times() if link is not None else None
        agent = spent.user + spent.system if spent is not None else 0.0
        mark = Mark(trainer.global_step, *self.wrote, time.monotonic_ns(), time.process_time(), agent)
        with (self.directory / f"marks-rank{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(mark) + "\n")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy: Any = trainer.strategy
        if getattr(strategy, "engine", None) is None:
            return
        mine, entries = strategy.engine.memory.owned(), strategy.entries()
        lengths = [part.length for part, _ in mine.parts]
        held = sum(_local(entry.tensor).numel() * _local(entry.tensor).element_size() for entry in entries)
        sizes = {"held": held, "owned": sum(lengths), "travelling": sum(lengths[: mine.travelling])}
        (self.directory / f"sizes-rank{trainer.global_rank}.json").write_text(json.dumps(sizes))


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[no-any-return]


class Settle(pl.Callback):
    """Before each of `steps` the ranks wait until their newest snapshot is replicated: the next one is then captured for sure."""

    def __init__(self, steps: list[int]) -> None:
        self.steps = set(steps)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        strategy: Any = trainer.strategy
        if trainer.global_step not in self.steps or not hasattr(strategy, "engine"):
            return
        if strategy.landing is None:  # a replaced rank goes through what its peers have long done
            wait_until_replicated(strategy, strategy.engine.memory.capturing)


def wait_until_replicated(strategy: Any, step: int) -> None:
    """Until the peers of all ranks keep the snapshots of a step. Raises `TimeoutError`."""
    board, deadline = strategy.link.board, time.monotonic() + _LIMIT_S
    while not reached(board.get(board.job, REPLICATED), strategy.world.generation, step):
        if time.monotonic() > deadline:
            raise TimeoutError(f"step {step} was not replicated within {_LIMIT_S:g} s")
        time.sleep(_POLL_S)


class Net(pl.LightningModule):
    """`depth` square layers of `width`, each one unit of FSDP."""

    def __init__(self, recipe: Recipe, meter: Meter) -> None:
        super().__init__()
        self.recipe, self.meter = recipe, meter
        width = recipe.width
        square = [layer for _ in range(recipe.depth) for layer in (nn.Linear(width, width), nn.GELU())]
        self.net = nn.Sequential(nn.Linear(FEATURES, width), *square, nn.Linear(width, 1))

    def configure_model(self) -> None:
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if self.recipe.kind == "ddp" or isinstance(self.net, FSDPModule):
            return
        world, kind = self.recipe.world, self.recipe.kind
        mesh = init_device_mesh("cpu", (world,)) if kind == "fsdp" else hybrid(Layout(kind, world))
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss: torch.Tensor = nn.functional.mse_loss(self.net(x), y)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-4)
        optimizer.register_step_post_hook(self.meter.written)
        return optimizer


Strategist = Callable[[Recipe, Path], Any]
"""Makes the strategy of a job."""


def our_strategy(recipe: Recipe, directory: Path) -> Any:
    """Ours, for a recipe."""
    options = {"telemetry": {"directory": str(directory / "gemini"), "banner": False}, **recipe.options}
    if recipe.kind == "ddp":
        return GeminiStrategy(**options)
    return GeminiFSDP2Strategy(data_parallel_size=recipe.world, tensor_parallel_size=1, **options)


def plain_strategy(recipe: Recipe, directory: Path) -> Any:
    """Lightning's own, which meets through a TCPStore."""
    if recipe.kind == "ddp":
        return DDPStrategy()
    return ModelParallelStrategy(data_parallel_size=recipe.world, tensor_parallel_size=1)


def script(directory: Path, recipe: Recipe, *callbacks: pl.Callback, strategy: Strategist = our_strategy) -> Callable[[], None]:
    """What every rank runs."""

    def train() -> None:
        torch.set_num_threads(1)
        pl.seed_everything(1)
        meter, chosen = Meter(directory), strategy(recipe, directory)
        ours = isinstance(chosen, (GeminiStrategy, GeminiFSDP2Strategy))
        gates = [Settle([gate - 1 for gate in recipe.gates]), Gate(directory, list(recipe.gates))]
        trainer = pl.Trainer(
            accelerator="cpu", devices=recipe.per_node if ours else recipe.world, num_nodes=recipe.nodes if ours else 1,
            strategy=chosen, max_steps=recipe.steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=str(directory), callbacks=[*gates, meter, *callbacks],
        )  # fmt: skip
        count = recipe.steps * recipe.batch * recipe.world
        data = TensorDataset(torch.rand(count, FEATURES), torch.rand(count, 1))
        trainer.fit(Net(recipe, meter), DataLoader(data, recipe.batch, shuffle=True))

    return train
