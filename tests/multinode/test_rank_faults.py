"""A fault of one rank in a job of several nodes: a spare process of its node takes its place, no other process changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_gemini.recovery.memory import Memory
from tests.multinode.lab import Lab
from tests.multinode.models import Recipe
from tests.support.campaign import more

CASES = [
    ("fsdp", "kill", "forward", 0, 0),
    ("ddp", "raise", "optimizer", 3, 3),
    ("fsdp", "kill", "optimizer", 3, 1),
    ("fsdp", "raise", "after_step", 5, 1),
    ("ddp", "kill", "validation", 2, 2),
    ("within", "kill", "forward", 3, 1),
    ("across", "kill", "optimizer", 3, 2),
    ("fsdp", "kill", "before_step", 4, 2),  # after a validation, all of which it goes through again
]
MORE = [
    ("ddp", "kill", "forward", 3, 1),
    ("fsdp", "raise", "backward", 5, 2),
    ("ddp", "stop", "forward", 3, 2),
    ("fsdp", "stop", "validation", 4, 3),
    ("ddp", "kill", "after_step", 4, 0),
    ("ddp", "raise", "validation", 6, 0),
    ("ddp", "kill", "before_step", 6, 0),
]


@pytest.mark.parametrize(("layout", "kind", "where", "step", "rank"), [*CASES, *more(*MORE)])
def test_fault(lab: Lab, layout: str, kind: str, where: str, step: int, rank: int) -> None:
    recipe = Recipe(layout, 4)
    faults: list[Any] = [{"kind": kind, "rank": rank, "step": step, "where": where}]
    job = lab.run(recipe, 2, faults=faults)
    assert job.injected == 1
    lab.same(recipe, job, recoveries=1, replaced=[] if kind == "raise" else [rank])


def _noting_drains(target: Callable[[], None]) -> None:
    original = Memory.drain

    def drain(self: Memory, *args: Any, **options: Any) -> None:
        Path(f"drained-{self.rank}").touch()  # in the job's directory
        original(self, *args, **options)

    Memory.drain = drain  # type: ignore[method-assign]
    target()


@pytest.mark.parametrize("per_node", [1, 2])
def test_a_step_is_copied_at_once_where_no_other_rank_of_the_node_has_it(lab: Lab, per_node: int) -> None:
    """So whoever dies right after it, while a copy in the background would have been under way, costs no completed step."""
    recipe = Recipe("ddp", 2 * per_node)
    faults: list[Any] = [{"kind": "kill", "rank": 1, "step": 3, "where": "before_step"}]
    job = lab.run(recipe, 2, faults=faults, wrapped=_noting_drains, replication={"when_behind": "wait"})
    assert bool(list(job.directory.glob("drained-*"))) == (per_node == 2)
    assert job.injected == 1
    lab.same(recipe, job, recoveries=1, replaced=[1])
