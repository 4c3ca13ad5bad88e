"""How a job of several nodes ends before its time: by a signal, by its script, by an error that comes again and again."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from tests.multinode.lab import Lab
from tests.multinode.models import Recipe, Strike
from tests.support.cluster import JobOnNodes

LONG = Recipe("ddp", 4, steps=4, epochs=1000)
DDP = Recipe("ddp", 4)


@pytest.mark.parametrize("nodes", [[0], [1], [0, 1]], ids=["root", "other", "all"])
def test_a_signal_ends_all_ranks_after_the_same_step(lab: Lab, nodes: list[int]) -> None:
    def during(job: JobOnNodes) -> None:
        job.until(lambda: job.step() >= 5, "some steps")
        for node in nodes:
            os.kill(job.agents[node], signal.SIGTERM)

    store = lab.directory / "store"
    job = lab.run(LONG, 2, spares=1, during=during, persistent={"url": str(store), "every_n_steps": 100000})
    assert job.statuses == {0: 143, 1: 143, 2: 143}, job.outputs()
    ends = [(job.directory / f"ended{rank}").read_text() for rank in range(4)]
    assert len(set(ends)) == 1 and ends[0].startswith("SIGTERMException"), ends
    (checkpoint,) = [path.parent.name for path in store.glob("step-*/.metadata")]
    assert checkpoint.startswith(f"step-{ends[0].split()[1]}."), "it is of the step after which they ended"


@pytest.mark.parametrize("code", [0, 3])
def test_a_script_fails_after_fit_on_one_node(lab: Lab, code: int) -> None:
    def wrapped(train: object) -> None:
        train()  # type: ignore[operator]
        if os.environ["LIGHTNING_GEMINI_RANK"] == "2" and code:
            sys.exit(code)

    job = lab.run(DDP, 2, spares=1, wrapped=wrapped)
    assert job.statuses == {0: code, 1: code, 2: code}, job.outputs()
    assert not code or "rank 2" in job.output(0)


def test_a_script_fails_before_fit_on_one_node(lab: Lab) -> None:
    def wrapped(train: object) -> None:
        if os.environ["LIGHTNING_GEMINI_RANK"] == "3":
            raise LookupError("no such data")
        train()  # type: ignore[operator]

    job = lab.run(DDP, 2, spares=1, wrapped=wrapped)
    assert job.statuses == {0: 1, 1: 1, 2: 1}, job.outputs()
    assert "no such data" in job.output(1)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_an_error_in_each_attempt_ends_the_job_with_it(lab: Lab, kind: str) -> None:
    strike = Strike("forward", 2, 3, "raise", always=True)
    job = lab.run(Recipe(kind, 4), 2, strike, spares=1, recovery={"max_faults_per_step": 2})
    assert job.statuses == {0: 1, 1: 1, 2: 1}, job.outputs()
    assert len((job.directory / "struck-0").read_text().split()) == 3
    for node in (0, 1):
        assert "max_faults_per_step=2" in job.output(node) and "Struck" in job.output(node), job.output(node)
