"""A fault of one rank in a job of several nodes: a spare process of its node takes its place, no other process changes."""

from __future__ import annotations

from typing import Any

import pytest

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
