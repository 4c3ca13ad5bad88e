"""A rank that is killed, or raises, in the models that people train: the run is bit-identical to the undisturbed one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.llama.models import LORA, Job, seen
from tests.support.campaign import more
from tests.support.jobs import Result, same

JOBS = {
    "ddp": Job(world=3),
    "ddp, bf16": Job(precision="bf16-mixed", model={"checkpoint_activations": True}),
    "fsdp2, bf16": Job("fsdp", precision="bf16-true", model={"checkpoint_activations": True}),
    "hsdp": Job("hsdp", 4),
    "lora": Job(world=3, model={"lora": LORA}),
    "lora, fsdp2": Job("fsdp", model={"lora": LORA}),
}
MORE = {
    "bf16-true": Job(precision="bf16-true"),
    "fsdp2, bf16-mixed": Job("fsdp", precision="bf16-mixed"),
    "hsdp, bf16, lora": Job("hsdp", 4, precision="bf16-true", model={"lora": LORA, "checkpoint_activations": True}),
    "lora, no snapshots": Job(model={"lora": LORA}, options={"snapshot": {"every_n_steps": 0}}),
    "lora, bf16": Job(precision="bf16-true", model={"lora": LORA}),
}


@pytest.mark.parametrize("name", [*JOBS, *more(*MORE)])
def test_killed_then_raised(tmp_path: Path, undisturbed: Callable[[Job], Result], name: str) -> None:
    """One rank is killed in a backward, then another one raises in a forward."""
    job = (JOBS | MORE)[name]
    kill = {"kind": "kill", "rank": 1, "step": 2, "where": "backward"}
    result = job.run(tmp_path, kill, {"kind": "raise", "rank": 0, "step": 4, "where": "forward"})
    same(undisturbed(job), result)
    assert result.injected == 2 and len(result.recoveries) == 2
    assert {rank for rank, pids in result.pids().items() if len(pids) > 1} == {1}


@pytest.fixture(scope="module")
def compiler() -> None:
    """Its imports take seconds: made here, they are not made in every rank."""
    torch.compile(lambda x: x + 1, backend="aot_eager")(torch.ones(2, requires_grad=True))
    torch._dynamo.utils.counters.clear()


@pytest.mark.parametrize("kind", ["ddp", *more("fsdp")])
def test_survivors_do_not_compile_again(tmp_path: Path, undisturbed: Callable[[Job], Result], compiler: None, kind: str) -> None:
    job = Job(kind, model={"compile": "aot_eager"})
    result = job.run(tmp_path, {"kind": "kill", "rank": 1, "step": 2, "where": "optimizer"})
    same(undisturbed(job), result)
    assert result.injected == len(result.recoveries) == 1
    survivor, replaced = (seen(result, rank)["compiled"] for rank in (0, 1))
    expected = seen(undisturbed(job), 0)["compiled"]
    assert survivor == expected and survivor["1"] > 0, "the same graphs at the same steps as without the fault"
    assert survivor["2"] == survivor["5"], "and none after the fault"
    assert replaced["5"] == expected["5"], "the replacement compiles once"
