"""LoRA: a step's snapshot has the adapters and their moments; the base comes from the script, checked, or from a live replica."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.llama.models import LORA, Job, llama, seen
from tests.multinode.models import Saboteur, Strike
from tests.support.campaign import more
from tests.support.cluster import on_nodes
from tests.support.etcd import Etcd
from tests.support.jobs import Result, run_job, same

DDP = Job(model={"lora": LORA})


@pytest.mark.parametrize("job", [DDP, Job("fsdp", model={"lora": LORA})], ids=["ddp", "fsdp2"])
def test_only_what_trains_is_captured(undisturbed: Callable[[Job], Result], job: Job) -> None:
    """In bytes, of all ranks together."""
    found = [seen(undisturbed(job), rank) for rank in range(job.world)]
    sizes = {name: size for name, size in found[0]["sizes"].items() if name.startswith("param/")}
    adapters = {name for name in sizes if ".lora_" in name}
    assert found[0]["base"] == sorted(sizes.keys() - adapters) and adapters
    assert {name for each in found for name in each["owned"] if name.startswith("param/")} == adapters
    trained = sum(sizes[name] for name in adapters) * (job.world if job.kind == "fsdp" else 1)  # sizes are of a rank's part
    counters = 4 * len(adapters) * (job.world if job.kind == "fsdp" else 1)
    assert sum(each["bytes"] for each in found) == 3 * trained + counters, "adapters, two moments of each, its count of steps"


def test_a_slot_has_no_room_for_the_base(tmp_path: Path) -> None:
    """A base of 9 MB, two ranks: the arenas are as large as adapters need, and two units of copying."""
    wide = {"hidden_size": 256, "intermediate_size": 768, "vocab_size": 2048}
    result = Job(steps=2, model={"lora": LORA, **{"net": {**llama().options, **wide}}}).run(tmp_path)
    assert result.exit_status == 0, result.output
    found = seen(result, 0)
    base = sum(found["sizes"][name] for name in found["base"])
    assert base > 9e6 and found["bytes"] < 1e6 and found["slot"] < found["bytes"] + (4 << 20)


def test_a_base_that_the_replacement_builds_otherwise_comes_from_a_replica(tmp_path: Path, undisturbed: Callable[[Job], Result]) -> None:
    job = replace(DDP, own_base=True)
    result = job.run(tmp_path, {"kind": "kill", "rank": 1, "where": "backward", "step": 3})
    same(undisturbed(job), result)
    found = seen(result, 1)
    assert found["received"] == sum(found["sizes"][name] for name in found["base"] if "norm" not in name), "norms are all ones anyway"
    assert seen(undisturbed(job), 0)["digests"] == found["digests"], "of every weight"


@pytest.mark.parametrize("changed", [False, True])
def test_a_base_from_a_file(tmp_path: Path, changed: bool) -> None:
    """A replacement reads it again; where the file is another one by then, FSDP2 without replicas cannot go on, and says so."""
    module = llama()
    module.configure_model()
    weights = {name.removeprefix("net."): value for name, value in module.state_dict().items()}
    file = tmp_path / "base.pt"
    torch.save(weights, file)
    job = Job("fsdp", model={"lora": LORA, "weights": str(file)}, options={"recovery": {"spares": 0}})
    expected = job.run(tmp_path / "undisturbed")

    class Change(Saboteur):
        def on_train_start(self, trainer: Any, *_: Any) -> None:
            if changed and trainer.is_global_zero:
                torch.save({name: value + 1e-3 for name, value in weights.items()}, tmp_path / "new.pt")
                (tmp_path / "new.pt").rename(file)

    fault = {"kind": "kill", "rank": 1, "where": "backward", "step": 2}
    result = run_job(tmp_path / "job", lambda: job.train(tmp_path / "job", [fault], Change(tmp_path, ())), job.world)
    assert result.injected == 1
    if changed:
        assert result.exit_status != 0 and not result.recoveries
        assert "frozen parameters differ from what they were at the first step, and no live rank can give them" in result.output
    else:
        same(expected, result)


@pytest.mark.parametrize("kind", ["ddp", *more("fsdp")])
def test_a_checkpoint_has_the_whole_model(tmp_path: Path, undisturbed: Callable[[Job], Result], kind: str) -> None:
    job = replace(DDP, kind=kind)
    persistent = {"url": str(tmp_path / "store"), "every_n_steps": 2, "keep_last": 1}
    first = replace(job, steps=3, options={"persistent": persistent}).run(tmp_path / "first")
    assert first.exit_status == 0, first.output
    (folder,) = (path.parent for path in (tmp_path / "store").glob("step-2*/.metadata"))
    dcp_to_torch_save(str(folder), str(tmp_path / "plain.ckpt"))
    state = torch.load(tmp_path / "plain.ckpt", weights_only=False)["state_dict"]
    module = llama(lora=LORA)
    module.configure_model()
    assert state.keys() == module.state_dict().keys()
    if kind == "ddp":  # the recipe draws each shard apart
        assert all(torch.equal(state[name], value) for name, value in module.state_dict().items() if "lora_" not in name)
    second = replace(job, options={"persistent": {**persistent, "every_n_steps": 1000}}, own_base=True).run(tmp_path / "second")
    assert "goes on from step 2" in second.output
    same(undisturbed(job), second)


class Asks(pl.Callback):
    """Sends SIGTERM to the agent, some steps before the end."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 2 and trainer.is_global_zero:
            os.kill(os.getppid(), signal.SIGTERM)


def test_the_checkpoint_of_a_job_that_a_signal_has_ended_has_the_base_too(tmp_path: Path, undisturbed: Callable[[Job], Result]) -> None:
    """Although that step is none of its cadence. The next job builds another base, and goes on with the first one's."""
    longer = replace(DDP, steps=12)
    job = replace(longer, options={"persistent": {"url": str(tmp_path / "store"), "every_n_steps": 1000}})
    first = run_job(tmp_path / "first", lambda: job.train(tmp_path / "first", [], Asks()), job.world)
    assert first.exit_status == 143, first.output
    second = replace(job, own_base=True).run(tmp_path / "second")
    assert "goes on from step" in second.output
    same(undisturbed(longer), second)


@pytest.mark.parametrize("own_base", [False, True])
def test_a_node_is_lost(tmp_path: Path, etcd: Etcd, undisturbed: Callable[[Job], Result], own_base: bool) -> None:
    """Its ranks' base comes from the script on a spare node, or from the other node."""
    job = replace(DDP, nodes=2, own_base=own_base, options={"replication": {"when_behind": "wait"}})  # else step 3 may have no snapshot
    directory = tmp_path / f"job-{tmp_path.name}"
    strike = Strike("before_step", 1, 3, kept=True)
    running = on_nodes(
        directory, [etcd.url], lambda: job.train(directory, [], Saboteur(directory, (strike,))), 2, 1, spares=1, domains=(), membership={}
    )
    try:
        running.wait(50.0)
    finally:
        running.stop()
    assert (directory / "struck-0").exists() and len(running.recoveries) == 1, running.outputs()
    expected = undisturbed(replace(DDP, own_base=own_base)).ranks
    for rank, record in expected.items():
        assert all(record[key] == running.ranks[rank][key] for key in record.keys() - {"pid", "objects"}), running.outputs()
