"""Frozen parameters: out of the snapshots, verified in a replaced rank, given by a live replica where its script has built others; and
state again as soon as anybody trains them or writes to them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from lightning_gemini import GeminiFSDP2Strategy, GeminiStrategy
from tests.support.campaign import more
from tests.support.jobs import Recorder, Result, run_job, same
from tests.support.models import Net, loader

STEPS = 6


@dataclass(frozen=True)
class Plan:
    """A training. `kind`: ddp, fsdp, hsdp. `base`: how its frozen part is built: `seeded`, or `own` where every process but the first of
    rank 0 draws other numbers. `writes`: who changes the frozen part in training; see `Changes`."""

    kind: str = "ddp"
    base: str = "seeded"
    writes: str = ""


class Adapted(Net):
    """`Net`, of which only the last two layers train."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(width=96, fsdp=plan.kind != "ddp")
        self.plan = plan
        rank = os.environ["LIGHTNING_GEMINI_RANK"]  # empty in a spare
        if plan.base == "own" and not (rank if plan.kind != "ddp" else rank == "0"):
            generator = torch.Generator().manual_seed(os.getpid())
            for parameter in self.parameters():
                parameter.data.normal_(generator=generator)
        for parameter in self.frozen if plan.writes != "finetuning" else []:
            parameter.requires_grad_(False)

    @property
    def frozen(self) -> list[nn.Parameter]:
        return list(self.net[:-3].parameters())

    def configure_model(self) -> None:
        if self.plan.kind == "hsdp" and not isinstance(self.net, FSDPModule):
            fully_shard(self.net, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
        elif self.plan.kind == "fsdp":
            super().configure_model()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class Changes(pl.Callback):
    """Writes to the frozen part: `unfreeze` at step 3, a moving average of it from step 2 on that torch counts (`counted`) or not
    (`uncounted`), or for the first time inside the write of step 3 (`torn`)."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.plan.writes == "torn":

            def write(*_: Any) -> None:
                if trainer.global_step == 3:
                    with torch.no_grad():
                        pl_module.frozen[0].mul_(0.5)

            trainer.optimizers[0].register_step_pre_hook(write)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if self.plan.writes == "unfreeze" and step == 3:
            for parameter in pl_module.frozen[-2:]:
                parameter.requires_grad_(True)
            trainer.optimizers[0].add_param_group({"params": pl_module.frozen[-2:], "lr": 1e-3})
        if self.plan.writes in ("counted", "uncounted") and step >= 2:
            for parameter in pl_module.frozen:
                target = parameter.data if self.plan.writes == "uncounted" else parameter.detach()
                target.mul_(0.9).add_(0.01 * step)


class FineTuning(BaseFinetuning):
    """Lightning's own way, with BatchNorm: frozen in the first epoch of three steps."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[:-3])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[:-3], optimizer, lr=1e-3)


class Seen(pl.Callback):
    """Writes, at the end, what is in the snapshots."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        memory: Any = trainer.strategy.engine.memory  # type: ignore[attr-defined]
        memory.settle()
        owned = memory.owned()
        found = {"base": sorted(memory.frozen.names), "owned": [part.name for part, _ in owned.parts], "received": memory.received,
                 "bytes": sum(part.length for part, _ in owned.parts), "slot": memory.arena.capacity}  # fmt: skip
        (self.directory / f"seen-{trainer.global_rank}.json").write_text(json.dumps(found))


def train(directory: Path, plan: Plan, faults: list[dict[str, Any]]) -> None:
    pl.seed_everything(1)
    world = 4 if plan.kind == "hsdp" else 3
    strategy: Any = GeminiStrategy(faults=faults)  # type: ignore[arg-type]
    if plan.kind != "ddp":
        strategy = GeminiFSDP2Strategy(data_parallel_size=world, tensor_parallel_size=1, faults=faults)  # type: ignore[arg-type]
    trainer = pl.Trainer(
        accelerator="cpu", devices=world, strategy=strategy, max_steps=STEPS, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, logger=False, default_root_dir=str(directory),
        callbacks=[FineTuning() if plan.writes == "finetuning" else Changes(plan), Recorder(str(directory)), Seen(directory)],
        limit_train_batches=3,
    )  # fmt: skip
    trainer.fit(Adapted(plan), loader(4 * world * STEPS))


def job(directory: Path, plan: Plan, *faults: dict[str, Any]) -> Result:
    return run_job(directory, lambda: train(directory, plan, list(faults)), 4 if plan.kind == "hsdp" else 3)


def seen(result: Result, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((result.directory / f"seen-{rank}.json").read_text())
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    known: dict[Plan, Result] = {}

    def run(plan: Plan) -> Result:
        if plan not in known:
            known[plan] = job(tmp_path_factory.mktemp("undisturbed"), plan)
        return known[plan]

    return run


PLANS = [
    Plan("ddp"),
    Plan("fsdp"),
    Plan("ddp", "own"),
    Plan("hsdp", "own"),
    Plan("ddp", writes="unfreeze"),
    Plan("fsdp", writes="unfreeze"),
    Plan("ddp", writes="uncounted"),
    Plan("ddp", writes="finetuning"),
]
AGAIN = [Plan("fsdp"), Plan("ddp", writes="unfreeze"), Plan("ddp", writes="counted")]
PLACES = [("optimizer", 1), ("after_step", 3), ("optimizer", 5)]
MORE = [Plan("ddp", writes="counted"), Plan("fsdp", writes="uncounted"), Plan("ddp", "own", "counted")]


@pytest.mark.parametrize("plan", [*PLANS, *more(*MORE)], ids=str)
@pytest.mark.parametrize(("where", "step"), [("backward", 4), *more(*PLACES)])
def test_killed(tmp_path: Path, undisturbed: Any, plan: Plan, where: str, step: int) -> None:
    result = job(tmp_path, plan, {"kind": "kill", "rank": 1, "where": where, "step": step})
    same(undisturbed(plan), result)
    assert result.injected == len(result.recoveries) == 1
    assert bool(seen(result, 1)["received"]) == (plan.base == "own" and (not plan.writes or step < 2))
    expected = {"unfreeze": 6, "counted": 0, "uncounted": 0, "finetuning": 0, "": 8}
    assert {len(seen(result, rank)["base"]) for rank in range(3)} == {expected[plan.writes]}


def test_a_step_keeps_what_trains_and_no_more(undisturbed: Any) -> None:
    """In bytes: the base is four fifths of the model, and in no arena."""
    found = [seen(undisturbed(Plan("ddp")), rank) for rank in range(3)]
    width, trained = 96, 96 * 96 + 96 + 96 + 1
    assert sum(each["bytes"] for each in found) == 3 * 4 * trained + 4 * 4, "weights, two moments, four counters of steps"
    base = 4 * (16 * width + width + 2 * width + 2 * (width * width + width))
    assert sum(each["slot"] for each in found) < base + 3 * 4 * trained + 3 * 4 * (2 << 20), "no room for it either"
    assert not {name for each in found for name in each["owned"]} & set(found[0]["base"])


def test_nobody_can_give_it(tmp_path: Path) -> None:
    """FSDP2 without replicas, and a script that builds another base in each process."""
    result = job(tmp_path, Plan("fsdp", "own"), {"kind": "kill", "rank": 1, "where": "backward", "step": 2})
    assert result.exit_status != 0
    assert "frozen parameters differ from what they were at the first step, and no live rank can give them" in result.output
    assert "param/net.0.weight and 7 more" in result.output


def test_written_for_the_first_time_in_a_step_that_is_repeated(tmp_path: Path) -> None:
    result = job(tmp_path, Plan("ddp", writes="torn"), {"kind": "kill", "rank": 1, "where": "optimizer", "step": 3})
    assert result.exit_status != 0
    assert "frozen parameters differ from what they were at the first step" in result.output


@pytest.mark.parametrize("plan", [Plan("ddp", "own"), *more(*AGAIN)], ids=str)
def test_raised_between_steps(tmp_path: Path, undisturbed: Any, plan: Plan) -> None:
    """The rank goes through `fit` again in its own process, whose base is verified as it stands."""
    result = job(tmp_path, plan, {"kind": "raise", "rank": 1, "where": "after_step", "step": 4})
    same(undisturbed(plan), result)
    assert result.injected == len(result.recoveries) == 1 and not seen(result, 1)["received"]


def test_all_ranks_die_before_a_step(tmp_path: Path, undisturbed: Any) -> None:
    """Nobody is left who could give: the script's base is all there is, and is right."""
    faults = [{"kind": "kill", "rank": rank, "where": "forward", "step": 3} for rank in range(3)]
    result = job(tmp_path, Plan("ddp"), *faults)
    same(undisturbed(Plan("ddp")), result)
    assert result.injected == 3 and {len(pids) for pids in result.pids().values()} == {2}
