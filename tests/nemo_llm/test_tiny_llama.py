"""A tiny Llama of NeMo's loses a rank, under each parallelism: bit-identical to the undisturbed run. CUDA is emulated (see `cpu`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.nemo_llm.jobs import job, plain
from tests.support.jobs import Result, same

pytestmark = [pytest.mark.usefixtures("nemo"), pytest.mark.timeout(300)]


class Case(NamedTuple):
    """A job: ranks, what is given to the strategy, what to the model."""

    world: int
    strategy: dict[str, Any] = {}
    model: dict[str, Any] = {}


TP = {"tensor_model_parallel_size": 2}
JOBS = {
    "dp2": Case(2),
    "tp2": Case(2, TP),
    "tp2-dp2": Case(4, TP),
    "dp2-distributed": Case(2, model={"distributed": True}),
    "dp2-distributed-bf16": Case(2, model={"distributed": True, "bf16": True}),
    "dp2-overlap": Case(2, {"ddp": {"overlap_grad_reduce": True, "overlap_param_gather": True}}, {"distributed": True}),
    "dp4-2-instances": Case(4, {"num_distributed_optimizer_instances": 2}, {"distributed": True}),
    "ep2": Case(2, {"expert_model_parallel_size": 2}, {"num_moe_experts": 4, "moe_token_dispatcher_type": "alltoall", "distributed": True}),
    "dp2-lora": Case(2, model={"lora": True}),
    "tp2-lora": Case(2, TP, {"lora": True}),
    "dp2-distributed-lora": Case(2, model={"distributed": True, "lora": True}),
    "pp2": Case(2, {"pipeline_model_parallel_size": 2, "pipeline_dtype": "float32"}),
}

Undisturbed = Callable[[str], Result]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    known: dict[str, Result] = {}

    def run(name: str) -> Result:
        if name not in known:
            known[name] = job(tmp_path_factory.mktemp(name), **JOBS[name]._asdict())
            assert known[name].exit_status == 0, known[name].output[-6000:]
        return known[name]

    return run


@pytest.mark.parametrize("name", ["dp2", "tp2", "dp2-lora", "tp2-lora"])
def test_undisturbed_is_as_nemo(tmp_path: Path, undisturbed: Undisturbed, name: str) -> None:
    """Same bits as NeMo's own MegatronStrategy."""
    same(undisturbed(name), plain(tmp_path, **JOBS[name]._asdict()))


def test_with_overlap_all_but_the_parameters_is_as_nemo(tmp_path: Path, undisturbed: Undisturbed) -> None:
    """NeMo leaves the last step's parameters ungathered; ours are whole after each step."""
    ours, theirs = undisturbed("dp2-overlap"), plain(tmp_path, **JOBS["dp2-overlap"]._asdict())
    assert theirs.exit_status == 0, theirs.output
    for rank, record in theirs.ranks.items():
        assert {**record, "params": 0} == {**ours.ranks[rank], "params": 0}


@pytest.mark.parametrize(
    ("name", "kind", "where", "rank", "step"),
    [
        ("dp2", "kill", "forward", 0, 3),
        ("dp2", "kill", "backward", 1, 0),
        ("dp2", "raise", "backward", 1, 4),
        ("dp2", "kill", "optimizer", 0, 5),
        ("tp2", "kill", "backward", 1, 3),
        ("tp2", "kill", "after_step", 0, 5),
        ("tp2-dp2", "kill", "backward", 2, 3),
        ("tp2-dp2", "kill", "optimizer", 1, 4),
        ("dp2-distributed", "kill", "optimizer", 1, 3),
        ("dp2-distributed-bf16", "kill", "optimizer", 0, 3),
        ("dp2-distributed-bf16", "raise", "callback", 1, 3),
        ("dp2-overlap", "kill", "forward", 1, 3),
        ("dp2-overlap", "kill", "backward", 0, 4),
        ("dp2-overlap", "raise", "backward", 1, 4),
        ("dp2-overlap", "kill", "optimizer", 1, 3),
        ("dp4-2-instances", "kill", "optimizer", 3, 3),
        ("ep2", "kill", "optimizer", 1, 3),
        ("dp2-lora", "kill", "backward", 1, 0),
        ("dp2-lora", "kill", "optimizer", 0, 3),
        ("dp2-lora", "raise", "callback", 1, 3),
        ("tp2-lora", "kill", "backward", 1, 3),
        ("dp2-distributed-lora", "kill", "forward", 1, 4),
        ("pp2", "kill", "forward", 1, 3),
        ("pp2", "kill", "optimizer", 0, 0),
    ],
)
def test_a_rank_is_lost(tmp_path: Path, undisturbed: Undisturbed, name: str, kind: str, where: str, rank: int, step: int) -> None:
    fault = {"kind": kind, "rank": rank, "step": step, "where": where}
    result = job(tmp_path, faults=[fault], **JOBS[name]._asdict())
    same(undisturbed(name), result)
    assert result.injected == 1 and len(result.recoveries) == 1


def test_in_validation(tmp_path: Path) -> None:
    """Results of tensor parallelism's collectives are replayed to the rank that takes the place."""
    options = {"limit_val_batches": 2, "val_check_interval": 3}
    undisturbed = job(tmp_path / "undisturbed", **JOBS["tp2"]._asdict(), **options)
    fault = {"kind": "kill", "rank": 1, "step": 3, "where": "validation"}
    result = job(tmp_path / "lost", faults=[fault], **JOBS["tp2"]._asdict(), **options)
    same(undisturbed, result)
    assert result.injected == 1 and len(result.recoveries) == 1


def test_validation_of_a_pipeline_is_refused(tmp_path: Path) -> None:
    result = job(tmp_path, **JOBS["pp2"]._asdict(), limit_val_batches=2)
    assert result.exit_status != 0
    assert "validation with pipeline_model_parallel_size=2 cannot be recovered" in result.output


@pytest.mark.parametrize(
    ("name", "kind", "where", "rank", "replica"),
    [
        ("dp2", "kill", "backward", 1, 0),
        ("tp2-dp2", "kill", "forward", 0, 2),
        ("dp4-2-instances", "kill", "backward", 3, 1),
        ("dp4-2-instances", "raise", "backward", 3, None),
    ],
)
def test_without_snapshots_state_comes_from_a_healthy_replica(
    tmp_path: Path, undisturbed: Undisturbed, name: str, kind: str, where: str, rank: int, replica: int | None
) -> None:
    """Of the same model shard, and of the same shard of the optimizer; who raised before the write needs nobody."""
    fault = {"kind": kind, "rank": rank, "step": 3, "where": where}
    result = job(tmp_path, faults=[fault], snapshot={"every_n_steps": 0}, **JOBS[name]._asdict())
    same(undisturbed(name), result)
    (plan,) = [event for event in result.agent_events if event["event"] == "plan"]
    assert (plan["action"], plan["repeated_steps"]) == ("in_place", 0)
    assert plan["donors"] == ({} if replica is None else {str(rank): replica})
    assert result.injected == 1


@pytest.mark.parametrize("name", ["tp2", "dp2-distributed"])
def test_without_snapshots_and_without_a_replica_is_refused(tmp_path: Path, name: str) -> None:
    result = job(tmp_path, snapshot={"every_n_steps": 0}, **JOBS[name]._asdict())
    assert result.exit_status != 0
    assert "snapshot.every_n_steps=0 with gemini_megatron leaves nothing to recover from" in result.output
