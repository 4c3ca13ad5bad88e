"""Lightning jobs of a few forked ranks that leave a step in arenas, and jobs that load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_gemini.compat import lightning as compat
from lightning_gemini.snapshot.slots import SlotFile
from lightning_gemini.state.catalogue import parameters_of
from lightning_gemini.state.ownership import Layout
from lightning_gemini.storage import meta
from lightning_gemini.storage.description import publish
from tests.storage.helpers import Node, capture, in_processes
from tests.support.meeting import free_port

State = dict[str, torch.Tensor]


class Net(pl.LightningModule):
    """Uneven sizes, a buffer, a frozen and a shared parameter, two optimizers' worth of groups, a scheduler, hyperparameters."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.first, self.last = nn.Linear(7, width), nn.Linear(width, 3, bias=False)
        self.body = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        self.norm = nn.BatchNorm1d(width)
        self.again = self.last  # a shared parameter has two names
        self.fixed = nn.Parameter(torch.ones(3), requires_grad=False)

    def configure_model(self) -> None:
        if self.device_mesh is not None and not meta.is_sharded(self):
            mesh = self.device_mesh["data_parallel"]
            for part in (self.first, self.body, self.last):
                fully_shard(part, mesh=mesh)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = (self.again(self.body(self.norm(self.first(batch[0])))) * self.fixed).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        groups = [{"params": [*self.first.parameters(), *self.last.parameters()], "lr": 1e-2}, {"params": self.body.parameters()}]
        optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.8, 0.9))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2), "interval": "step"}}


def state_of(module: pl.LightningModule, trainer: pl.Trainer) -> State:
    """Everything by name, whole."""
    found = {name: value for name, value in module.state_dict().items()}
    names = meta.names_of(module)
    for number, optimizer in enumerate(compat.unwrap_optimizers(trainer)):
        for parameter in parameters_of(optimizer):
            for key, value in optimizer.state.get(parameter, {}).items():
                found[f"{number}/{names[id(parameter)]}/{key}"] = value
        found[f"{number}/lr"] = torch.tensor([group["lr"] for group in optimizer.param_groups])
    return {name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu().clone() for name, value in found.items()}


class Leave(pl.Callback):
    """Captures step `step` as our strategy does, and says what the state was."""

    def __init__(self, step: int, nodes: list[Node]) -> None:
        self.step, self.nodes, self.state, self.sum = step, nodes, {}, 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"sum": self.sum}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.sum = state_dict["sum"]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.sum += 1.5
        if trainer.global_step != self.step:
            return
        per_node = len(self.nodes[0].ranks)
        node, place = self.nodes[trainer.global_rank // per_node], trainer.global_rank % per_node
        layout = Layout(trainer.global_rank, trainer.world_size, per_node, min(2, len(self.nodes)))
        optimizers = compat.unwrap_optimizers(trainer)
        local = f"rank {trainer.global_rank}".encode()
        capture(node.arenas[place], self.step, pl_module, optimizers, layout, replicated=not meta.is_sharded(pl_module), local=local)
        description = meta.describe(trainer)
        if trainer.global_rank == 0:
            publish(SlotFile(node.description), self.step, description)
        self.state = state_of(pl_module, trainer)


class Begin(pl.Callback):
    """What a resumed job begins with."""

    def __init__(self) -> None:
        self.state: State = {}
        self.step = self.batch = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.state, self.step = state_of(pl_module, trainer), trainer.global_step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.batch = batch_idx if self.batch < 0 else self.batch


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(64, 7, generator=torch.Generator().manual_seed(1))), batch_size=4)


def trainer(strategy: str | pl.strategies.Strategy, size: int, steps: int, callbacks: list[pl.Callback]) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=size,
        strategy=strategy,
        max_steps=steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def environ() -> dict[str, str]:
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo", "NODE_RANK": "0"}


def kind(name: str) -> pl.strategies.Strategy:
    return ModelParallelStrategy() if name == "fsdp2" else DDPStrategy(process_group_backend="gloo")


def left(strategy: str, nodes: list[Node], step: int = 3) -> State:
    """Train to `step` and leave it in the arenas of `nodes`; the state then."""
    size = sum(len(node.ranks) for node in nodes)

    def body(rank: int) -> State:
        pl.seed_everything(5)
        callback = Leave(step, nodes)
        trainer(kind(strategy), size, step, [callback]).fit(Net(), loader())
        return callback.state

    return in_processes(body, size, environ())[0]


class Resumed:
    """How a job began, and what it was in the end."""

    def __init__(self, begin: Begin, leave: Leave) -> None:
        self.state, self.step, self.batch, self.sum = begin.state, begin.step, begin.batch, leave.sum


def resumed(strategy: str, size: int, path: Path | str, steps: int = 5) -> Resumed:
    """Fit from a checkpoint, by Lightning alone."""

    def body(rank: int) -> Resumed:
        pl.seed_everything(6)
        begin, leave = Begin(), Leave(-1, [])
        trainer(kind(strategy), size, steps, [leave, begin]).fit(Net(), loader(), ckpt_path=str(path))
        return Resumed(begin, leave)

    return in_processes(body, size, environ())[0]


def same(a: State, b: State) -> None:
    assert a.keys() == b.keys() and a
    for name, value in a.items():
        assert value.dtype == b[name].dtype and torch.equal(value, b[name]), name
