"""Without a fault the number of nodes changes nothing: bit-equal to the same ranks on one node."""

from __future__ import annotations

import pytest

from tests.multinode.lab import Lab
from tests.multinode.models import Recipe

CASES = [
    (Recipe("ddp", 2), 2),
    (Recipe("ddp", 4), 2),
    (Recipe("ddp", 3), 3),
    (Recipe("fsdp", 2), 2),
    (Recipe("fsdp", 4), 2),
    (Recipe("fsdp", 3), 3),
    (Recipe("across", 4), 2),
    (Recipe("within", 4), 2),
    (Recipe("ddp", 4, accumulate=2), 2),
    (Recipe("ddp", 2, manual=True), 2),
    (Recipe("ddp", 2, mapped=True), 2),
]


@pytest.mark.parametrize(("recipe", "nodes"), CASES, ids=str)
def test_undisturbed(lab: Lab, recipe: Recipe, nodes: int) -> None:
    job = lab.run(recipe, nodes)
    lab.same(recipe, job)
