"""A node is cut off, without a word, in the middle of a step or between two: a spare node takes its place, and it stops by itself."""

from __future__ import annotations

import time

import pytest

from tests.multinode.models import Recipe, Strike
from tests.multinode.network import Network, ends_its_ranks, held, noticed_s
from tests.support.cluster import JobOnNodes
from tests.support.nodes import require_one_way

DDP, FSDP = Recipe("ddp", 2), Recipe("fsdp", 2)
NOTICED_S = 5.0
"""What is promised at the default lease of 4 s: it was renewed at most a second before, and etcd ends leases every half second."""
SLACK_S = 1.5
"""A machine that is busy with the nodes themselves; and a node that hears nothing may have renewed its lease once more."""

CASES = {
    "cable, in a step": ("cut", FSDP, Strike("forward", 1, 3, kind="wait", kept=True)),
    "hears nothing": ("deafen", DDP, Strike("forward", 1, 3, kind="wait", kept=True)),
}
MORE = {
    f"{how}, {recipe.kind}, {where}, rank {rank}": (how, recipe, Strike(where, rank, 4, kind="wait", kept=True))
    for how in ("cut", "part", "deafen", "mute")
    for recipe in (DDP, FSDP)
    for where in ("forward", "optimizer", "after_step", "validation", "epoch_end")
    for rank in (0, 1)
    if where != "optimizer" or recipe is DDP
}


def cut_off(network: Network, how: str, recipe: Recipe, strike: Strike) -> None:
    node = strike.rank

    def during(job: JobOnNodes) -> None:
        held(job)
        job.until(lambda: bool(job.named_of(2, "spare_ready")), "a spare node")
        begun = time.monotonic_ns()
        getattr(network.nodes, how)(node)
        noticed = noticed_s(job, 1 - node, begun)
        stopped = ends_its_ranks(job, node, begun)
        print(f"{how}, {strike.where}: noticed after {noticed:.2f} s; the node itself stopped after {stopped:.2f} s")
        assert noticed < NOTICED_S + SLACK_S
        assert stopped < noticed + 0.5, "it may have worked for longer than it was waited for"
        job.kill(node)

    job = network.run(recipe, 2, strike, spares=1, during=during)
    (recovery,) = job.recoveries
    print(f"recovered: {recovery['seconds']}")
    network.same(recipe, job, recoveries=1, lost=[node], replaced=[node])


@pytest.mark.parametrize("name", CASES)
def test_a_node_is_cut_off(network: Network, name: str) -> None:
    how, recipe, strike = CASES[name]
    if how in ("deafen", "mute"):
        require_one_way()
    cut_off(network, how, recipe, strike)


@pytest.mark.campaign
@pytest.mark.parametrize("name", MORE)
def test_a_node_is_cut_off_at_any_place(network: Network, name: str) -> None:
    require_one_way()
    cut_off(network, *MORE[name])
