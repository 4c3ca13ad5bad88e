"""Random deaths of nodes and ranks, run after run: each bit-equal to the undisturbed run. `make chaos` runs it."""

from __future__ import annotations

import os
import random
import statistics

import pytest

from tests.multinode.lab import Lab
from tests.multinode.models import Recipe, Strike

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(1800)]
RUNS = 7 * int(os.environ.get("GEMINI_CHAOS", "0"))
PLACES = ("forward", "optimizer", "before_step", "after_step", "validation")
KINDS = ("node", "node", "node", "agent", "kill", "raise", "stop")


def drawn(random_: random.Random, recipe: Recipe, nodes: int) -> list[Strike]:
    """Up to three, in different steps. Those on nodes wait until nothing can be lost by them; the rest come when they come."""
    last = recipe.steps * recipe.epochs
    steps = sorted(random_.sample(range(1, last), random_.randint(1, 3)))
    strikes = []
    for step in steps:
        where, kind = random_.choice(PLACES), random_.choice(KINDS)
        if where == "validation":
            step = max(2, step - step % 2)
        kept = where in ("forward", "before_step", "validation") and kind in ("node", "agent")
        strikes.append(Strike(where, random_.randrange(recipe.world), step, kind, kept=kept))
    return strikes


@pytest.mark.parametrize(("kind", "nodes", "world"), [("ddp", 2, 4), ("fsdp", 2, 4), ("fsdp", 3, 3), ("within", 2, 4)])
def test_campaign(lab: Lab, kind: str, nodes: int, world: int) -> None:
    recipe, seconds = Recipe(kind, world, steps=6), list[float]()
    for run in range(RUNS):
        strikes = drawn(random.Random(f"{kind} {nodes} {world} {run}"), recipe, nodes)
        job = lab.run(recipe, nodes, *strikes, spares=len(strikes), all_must_strike=False)
        lab.same_bits(recipe, job)
        struck = len(list(job.directory.glob("struck-*")))
        assert struck and len(job.recoveries) >= 1
        seconds += [sum(recovery["seconds"].values()) for recovery in job.recoveries]
        repeated = sum(recovery["repeated_steps"] for recovery in job.recoveries)
        print(f"{kind} {nodes}x{world // nodes} run {run}: {struck} strikes, {len(job.recoveries)} recoveries, {repeated} steps repeated")
    print(f"{kind}: {RUNS} runs, {len(seconds)} recoveries, median {statistics.median(seconds):.2f} s, longest {max(seconds):.2f} s")
