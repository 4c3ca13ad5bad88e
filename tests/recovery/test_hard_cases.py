"""Faults in recoveries, several at once, corrupt memory, no spare, cadence: the cases in which other systems give up."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil
import pytest

from lightning_gemini import GeminiFSDP2Strategy, GeminiStrategy
from lightning_gemini.recovery.engine import Engine
from lightning_gemini.recovery.landing import Landing
from lightning_gemini.snapshot.slots import PAGE
from lightning_gemini.storage.catalog import newest
from tests.support.campaign import more
from tests.support.jobs import Recorder, Result, run_job, same
from tests.support.models import Net, loader

WORLD = 3


def train(directory: Path, fsdp: bool = False, prepare: Callable[[], None] = lambda: None, **options: Any) -> None:
    prepare()
    pl.seed_everything(1)
    strategy = GeminiFSDP2Strategy(data_parallel_size=WORLD, tensor_parallel_size=1, **options) if fsdp else GeminiStrategy(**options)
    trainer = pl.Trainer(
        accelerator="cpu", devices=WORLD, strategy=strategy, max_epochs=2, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, logger=False, gradient_clip_val=0.5, default_root_dir=str(directory),
        callbacks=[Recorder(str(directory))], num_sanity_val_steps=0, val_check_interval=4,
    )  # fmt: skip
    trainer.fit(Net(fsdp=fsdp), loader(), loader(24, shuffle=False))


def job(directory: Path, during: Callable[[int], None] | None = None, **options: Any) -> Result:
    return run_job(directory, lambda: train(directory, **options), WORLD, during=during)


@pytest.fixture(scope="module", params=[False, True], ids=["ddp", "fsdp2"])
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[bool, Result]:
    return request.param, job(tmp_path_factory.mktemp("undisturbed"), fsdp=request.param)


def kill(rank: int, step: int, where: str = "forward") -> dict[str, Any]:
    return {"kind": "kill", "rank": rank, "step": step, "where": where}


@pytest.mark.parametrize("spares", [0, 2, *more(1)])
def test_two_ranks_die_in_one_step(tmp_path: Path, undisturbed: tuple[bool, Result], spares: int) -> None:
    fsdp, expected = undisturbed
    result = job(tmp_path, fsdp=fsdp, faults=[kill(0, 5), kill(2, 5)], recovery={"spares": spares})
    same(expected, result)
    assert result.injected == 2


@pytest.mark.parametrize("where", ["optimizer", *more("forward")])
def test_all_ranks_die_in_one_step(tmp_path: Path, undisturbed: tuple[bool, Result], where: str) -> None:
    fsdp, expected = undisturbed
    result = job(
        tmp_path, fsdp=fsdp, faults=[kill(rank, 5, where) for rank in range(WORLD)], recovery={"spares": 3, "max_faults_per_step": 9}
    )
    same(expected, result)
    assert result.injected == WORLD


def once(marker: Path) -> bool:
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def sabotage(phase: str, rank: int, marker: Path) -> None:
    """In this process, SIGKILL `rank` when it reaches a phase of its first recovery."""

    def die_once(self_rank: int) -> None:
        if self_rank == rank and once(marker):
            os.kill(os.getpid(), signal.SIGKILL)

    def before(owner: type, name: str, rank_of: Callable[[Any], int]) -> None:
        original = getattr(owner, name)

        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            die_once(rank_of(self))
            return original(self, *args, **kwargs)

        setattr(owner, name, wrapped)

    if phase == "stopping":
        before(Engine, "_follow", lambda engine: engine.world.rank)
    elif phase == "joining":
        before(Engine, "join", lambda engine: engine.world.rank)
    elif phase == "landing":
        before(Landing, "land", lambda landing: landing.link.rank)
    elif phase == "positioning":
        before(Landing, "position", lambda landing: landing.link.rank)


@pytest.mark.parametrize(("phase", "rank"), [("joining", 2), ("positioning", 1), ("landing", 1), *more(("stopping", 0), ("joining", 1))])
def test_a_fault_in_a_recovery(tmp_path: Path, undisturbed: tuple[bool, Result], phase: str, rank: int) -> None:
    fsdp, expected = undisturbed
    marker = tmp_path / "died"
    result = job(tmp_path, fsdp=fsdp, faults=[kill(1, 5)], prepare=lambda: sabotage(phase, rank, marker), recovery={"spares": 2})
    same(expected, result)
    assert result.injected == 1 and marker.exists()
    assert sum(event["event"] == "fault" for event in result.agent_events) == 2, result.agent_events


def test_a_flipped_byte_is_noticed_and_another_source_is_used(tmp_path: Path) -> None:
    expected = job(tmp_path / "undisturbed")
    marker = tmp_path / "flipped"

    def corrupt_own_memory_and_die() -> None:
        original = Net.training_step

        def training_step(self: Net, batch: Any, batch_idx: int) -> Any:
            engine = self.trainer.strategy.engine
            if engine.step == 5 and engine.world.rank == 1 and engine.in_step and once(marker):
                memory = engine.memory
                memory.settle()
                slot = memory.arena.find(5)
                place = PAGE + slot.place * memory.arena.capacity + slot.length - 10
                memory.arena.memory[place] ^= 1
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, batch, batch_idx)

        Net.training_step = training_step  # type: ignore[method-assign]

    result = job(tmp_path / "faulted", prepare=corrupt_own_memory_and_die)
    same(expected, result)
    assert marker.exists()
    assert "the checksum of byte" in "".join(str(event) for event in result.agent_events) + result.output
    assert [event["donors"] for event in result.agent_events if event["event"] == "plan"][-1] == {"1": 0}


@pytest.mark.parametrize("where", ["optimizer", "after_step", *more("forward")])
def test_cadence(tmp_path: Path, undisturbed: tuple[bool, Result], where: str) -> None:
    fsdp, expected = undisturbed
    result = job(tmp_path, fsdp=fsdp, faults=[kill(1, 5, where)], snapshot={"every_n_steps": 3})
    same(expected, result)
    assert result.injected == 1
    plans = [event for event in result.agent_events if event["event"] == "plan"]
    rewound = fsdp or where == "optimizer"
    assert (plans[-1]["action"], plans[-1]["repeated_steps"]) == (("rewind", 2) if rewound else ("in_place", 0))


@pytest.mark.parametrize("kind", ["kill", "raise"])
def test_without_snapshots_state_comes_from_a_live_replica(tmp_path: Path, kind: str) -> None:
    expected = job(tmp_path / "undisturbed")
    result = job(tmp_path / "faulted", faults=[kill(1, 5) | {"kind": kind}], snapshot={"every_n_steps": 0})
    same(expected, result)
    (plan,) = [event for event in result.agent_events if event["event"] == "plan"]
    assert (plan["action"], plan["repeated_steps"]) == ("in_place", 0) and ("1" in plan["donors"]) == (kind == "kill")
    assert result.injected == 1 and "no snapshots in memory" in result.output


def test_without_snapshots_one_rank_that_has_not_written_is_enough(tmp_path: Path) -> None:
    """Rank 0 dies having written nothing; rank 1 has, and gets the tensors of the step back from rank 2, which has not come so far."""
    expected = job(tmp_path / "undisturbed")
    wrote = tmp_path / "wrote"

    def on_before_optimizer_step(self: Net, optimizer: Any) -> None:  # after the backward, before the gate
        rank, deadline = self.trainer.global_rank, time.monotonic() + 30
        if self.trainer.global_step != 5 or self.trainer.strategy.world.generation:
            return
        if rank == 1:
            optimizer.register_step_post_hook(lambda *_: wrote.touch())
        while rank == 0 and not wrote.exists() or rank == 2 and not self.trainer.strategy.world.stale:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        if rank == 0 and once(tmp_path / "died"):
            os.kill(os.getpid(), signal.SIGKILL)

    def arrange() -> None:
        Net.on_before_optimizer_step = on_before_optimizer_step  # type: ignore[method-assign]

    result = job(tmp_path / "faulted", prepare=arrange, snapshot={"every_n_steps": 0})
    same(expected, result)
    assert (tmp_path / "died").exists()
    (plan,) = [event for event in result.agent_events if event["event"] == "plan"]
    assert plan["donors"] == {"0": 2, "1": 2}


def test_without_snapshots_a_death_in_the_write_goes_back_to_storage(tmp_path: Path) -> None:
    expected = job(tmp_path / "undisturbed")
    options = {"snapshot": {"every_n_steps": 0}, "faults": [kill(1, 5, "optimizer")]}
    store = str(tmp_path / "store")

    def on_before_optimizer_step(self: Net, optimizer: Any) -> None:  # before the gate: nothing is captured while step 2 is being written
        deadline = time.monotonic() + 30
        while self.trainer.global_step == 3 and newest(store) is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def arrange() -> None:
        Net.on_before_optimizer_step = on_before_optimizer_step  # type: ignore[method-assign]

    result = job(tmp_path / "stored", prepare=arrange, persistent={"url": store, "every_n_steps": 2}, **options)
    same(expected, result)
    plans = [event for event in result.agent_events if event["event"] == "plan"]
    assert plans[-1]["action"] in ("rewind", "storage") and plans[-1]["target"] == 4
    result = job(tmp_path / "not stored", **options)
    assert result.exit_status == 1 and "5 completed steps are lost, resume from your last checkpoint" in result.output


def test_without_snapshots_and_replicas_there_is_nothing_to_recover_from(tmp_path: Path) -> None:
    result = job(tmp_path, fsdp=True, snapshot={"every_n_steps": 0})
    assert result.exit_status == 1 and "snapshot.every_n_steps=0 with gemini_fsdp2 leaves nothing to recover from" in result.output


def test_an_error_that_comes_back_ends_the_job_and_is_shown(tmp_path: Path) -> None:
    def always_raise() -> None:
        original = Net.training_step

        def training_step(self: Net, batch: Any, batch_idx: int) -> Any:
            if self.trainer.global_step == 3 and self.trainer.global_rank == 1:
                raise KeyError("a bug in the user's code")
            return original(self, batch, batch_idx)

        Net.training_step = training_step  # type: ignore[method-assign]

    result = job(tmp_path, prepare=always_raise, recovery={"max_faults_per_step": 2})
    assert result.exit_status == 1
    assert "recovery.max_faults_per_step=2" in result.output
    assert result.output.count('KeyError: "a bug in the user\'s code"') == 1 and "in training_step" in result.output


def test_nothing_is_left_when_the_agent_is_killed(tmp_path: Path) -> None:
    ranks: list[psutil.Process] = []

    def kill_agent(pid: int) -> None:
        agent = psutil.Process(pid)
        deadline = time.monotonic() + 60
        while not (tmp_path / "gemini" / "rank0.jsonl").exists() or len(agent.children()) < WORLD + 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        ranks.extend(agent.children(recursive=True))
        ranks[1].suspend()
        agent.kill()

    result = job(tmp_path, during=kill_agent, faults=[{"kind": "stop", "rank": 2, "step": 6, "where": "forward"}])
    assert result.exit_status == -signal.SIGKILL
    gone, alive = psutil.wait_procs(ranks, timeout=5)
    for process in alive:
        process.kill()
    assert not alive and len(gone) >= WORLD + 1
    assert "its agent" in (tmp_path / "output.txt").read_text()
