"""All processes of a node die at once, at any moment: a spare node takes its place, the others keep their processes and lose nothing."""

from __future__ import annotations

from typing import Any

import pytest

from tests.multinode.lab import Lab
from tests.multinode.models import Recipe, Strike

DDP, FSDP, SMALL, RING = Recipe("ddp", 4), Recipe("fsdp", 4), Recipe("fsdp", 2), Recipe("fsdp", 3)

CASES: dict[str, tuple[Recipe, int, Strike, dict[str, Any]]] = {
    "root in forward": (FSDP, 2, Strike("forward", 0, 3, kept=True), {}),
    "other in forward": (FSDP, 2, Strike("forward", 3, 3, kept=True), {}),
    "optimizer": (SMALL, 2, Strike("optimizer", 1, 3), {}),
    "optimizer, ddp": (DDP, 2, Strike("optimizer", 2, 3), {}),
    "validation": (SMALL, 2, Strike("validation", 0, 4, kept=True), {}),
    "validation, ddp": (DDP, 2, Strike("validation", 1, 2, kept=True), {}),
    "end of epoch": (SMALL, 2, Strike("epoch_end", 1, 4, kept=True), {}),
    "end of epoch, ddp": (DDP, 2, Strike("epoch_end", 0, 4, kept=True), {}),
    "last step": (DDP, 2, Strike("epoch_end", 2, 8, kept=True), {}),
    "ring of 3": (RING, 3, Strike("forward", 1, 3, kept=True), {}),
    "ring of 5": (Recipe("fsdp", 5, steps=3), 5, Strike("forward", 4, 2, kept=True), {}),
    "3 copies": (RING, 3, Strike("forward", 0, 3, kept=True), {"replication": {"copies": 3}}),
    "hsdp across": (Recipe("across", 4), 2, Strike("forward", 0, 3, kept=True), {}),
    "hsdp within": (Recipe("within", 4), 2, Strike("forward", 2, 3, kept=True), {}),
    "no spare processes": (DDP, 2, Strike("forward", 0, 3, kept=True), {"recovery": {"spares": 0}}),
    "accumulating": (Recipe("ddp", 4, accumulate=2), 2, Strike("before_step", 1, 3, kept=True), {}),
    "manual": (Recipe("ddp", 2, manual=True), 2, Strike("manual", 1, 3, kept=True), {}),
    "mapped data": (Recipe("ddp", 2, mapped=True), 2, Strike("forward", 0, 3, kept=True), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_node_loss(lab: Lab, name: str) -> None:
    recipe, nodes, strike, options = CASES[name]
    job = lab.run(recipe, nodes, strike, spares=1, **options)
    per_node = recipe.world // nodes
    node = strike.rank // per_node
    lab.same(recipe, job, recoveries=1, lost=[node], replaced=range(node * per_node, node * per_node + per_node))
