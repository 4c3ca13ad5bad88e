"""The training on several nodes that is measured, and how its runs are started, struck and read.

An MLP with AdamW under FSDP2, DDP or HSDP. Processes are forked from the benchmark, one agent and its ranks per node, as the tests do it:
what imports cost is in no figure. Every rank appends a `Mark` for each completed step; agents write their telemetry.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import time
import uuid
from collections.abc import Callable, Iterator
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
from tests.multinode.models import Recipe as Layout
from tests.multinode.models import hybrid
from tests.support.cluster import JobOnNodes, on_nodes
from tests.support.etcd import Etcd
from tests.support.nodes import Nodes

FEATURES = 64
_ETCD = ("--heartbeat-interval", "10", "--election-timeout", "100", "--unsafe-no-fsync")
_LIMIT_S = 120.0


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
    """Before these steps the ranks wait until the benchmark lets them go on."""
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


def script(
    directory: Path, recipe: Recipe, *callbacks: pl.Callback, strategy: Callable[[Recipe, Path], Any] = our_strategy
) -> Callable[[], None]:
    """What every rank runs."""

    def train() -> None:
        torch.set_num_threads(1)
        pl.seed_everything(1)
        meter, chosen = Meter(directory), strategy(recipe, directory)
        ours = isinstance(chosen, (GeminiStrategy, GeminiFSDP2Strategy))
        trainer = pl.Trainer(
            accelerator="cpu", devices=recipe.per_node if ours else recipe.world, num_nodes=recipe.nodes if ours else 1,
            strategy=chosen, max_steps=recipe.steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=str(directory), callbacks=[Gate(directory, list(recipe.gates)), meter, *callbacks],
        )  # fmt: skip
        count = recipe.steps * recipe.batch * recipe.world
        data = TensorDataset(torch.rand(count, FEATURES), torch.rand(count, 1))
        trainer.fit(Net(recipe, meter), DataLoader(data, recipe.batch, shuffle=True))

    return train


# ---- where jobs run


class NoNamespaces(RuntimeError):
    """This machine, or this user, cannot make network namespaces."""


@dataclass(slots=True)
class Site:
    """An etcd, and a folder for jobs; with `nodes`, network namespaces for them, the last one of which has the etcd."""

    directory: Path
    url: str
    nodes: Nodes | None = None

    def start(self, recipe: Recipe, *callbacks: pl.Callback, spares: int = 0, **more: Any) -> JobOnNodes:
        """A job under way; the caller ends it with `stop`."""
        directory = self.directory / f"job-{uuid.uuid4().hex[:8]}"
        target = script(directory, recipe, *callbacks, **more)
        return on_nodes(directory, [self.url], target, recipe.nodes, recipe.per_node, spares, nodes=self.nodes)

    def run(self, recipe: Recipe, *callbacks: pl.Callback, **more: Any) -> JobOnNodes:
        """A job without faults, to its end."""
        job = self.start(recipe, *callbacks, **more)
        ended(job)
        return job


def ended(job: JobOnNodes, lost: tuple[int, ...] = ()) -> None:
    """Wait for the end of a job. Raises with its last words when a node other than those that are lost has failed."""
    try:
        statuses = job.wait(_LIMIT_S)
    finally:
        job.stop()
    if failed := {number: status for number, status in statuses.items() if status and number not in lost}:
        raise RuntimeError(f"nodes ended with {failed}:\n{job.outputs()}")


@contextlib.contextmanager
def site(directory: Path, namespaces: int = 0) -> Iterator[Site]:
    """A site on loopback, or one with so many namespaces for nodes. Raises `NoNamespaces`."""
    directory.mkdir(parents=True, exist_ok=True)
    if not namespaces:
        etcd = Etcd(directory / "etcd", flags=_ETCD)
        try:
            yield Site(directory, etcd.url)
        finally:
            etcd.stop()
        return
    try:
        nodes = Nodes(namespaces + 1)
    except OSError as error:
        raise NoNamespaces(f"network namespaces cannot be made here: {error}") from None
    try:
        server = Etcd(directory / "etcd", host=nodes.address(namespaces), port=2379, flags=_ETCD, start=False)
        running = nodes.exec(namespaces, "sh", "-c", f"exec {shlex.join(server.command)} >{directory}/etcd.log 2>&1")
        try:
            yield Site(directory, server.url, nodes)
        finally:
            running.kill()
            running.communicate()
    finally:
        nodes.close()


# ---- what jobs leave


def marks(directory: Path, rank: int) -> list[Mark]:
    """The completed steps of a rank, in the order of time; a torn line is left out."""
    path = directory / f"marks-rank{rank}.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [Mark(*json.loads(line)) for line in lines if line.startswith("[") and line.endswith("]")]


def sizes(directory: Path, rank: int) -> dict[str, int]:
    """Bytes of a rank's state: `held` on its device, `owned` in its arena, `travelling` to each peer."""
    found: dict[str, int] = json.loads((directory / f"sizes-rank{rank}.json").read_text())
    return found


def passed(job: JobOnNodes, step: int) -> bool:
    """Whether all ranks have completed `step` steps, so that they wait at its gate."""
    return all(any(mark.step >= step for mark in marks(job.directory, rank)) for rank in range(job.count * job.per_node))


def replicated(job: JobOnNodes, step: int) -> bool:
    """Whether the snapshots of a step are kept by the peers of all ranks."""
    return len({event["rank"] for event in job.named("replicated") if event["step"] >= step}) == job.count * job.per_node


def open_gate(job: JobOnNodes, step: int) -> None:
    """The ranks go on."""
    (job.directory / f"go-{step}").touch()


def spare_ready(job: JobOnNodes, number: int) -> bool:
    """Whether the processes of a spare node have run the script up to `fit`."""
    return len(job.named_of(number, "spare_ready")) >= job.per_node


def completed_after(directory: Path, world: int, step: int, since_ns: int) -> float:
    """Seconds from `since_ns` until all ranks have completed the step after `step`, for the first time since then."""
    done = [min((m.done_ns for m in marks(directory, rank) if m.step > step and m.done_ns > since_ns), default=0) for rank in range(world)]
    return (max(done) - since_ns) / 1e9 if all(done) else float("inf")


def kill(job: JobOnNodes, number: int) -> int:
    """All processes of a node at once; the moment before, in monotonic ns."""
    now = time.monotonic_ns()
    job.kill(number)
    return now
