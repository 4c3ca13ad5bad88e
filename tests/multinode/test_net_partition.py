"""Nodes that are on the wrong side of a partition stop by themselves; when it is over they come back, and are of use again."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.multinode.models import Recipe, Strike
from tests.multinode.network import NODES, Network, ends_its_ranks, held, noticed_s
from tests.support.cluster import JobOnNodes

THREE = Recipe("fsdp", 3)
QUICK = {"lease_ttl_s": 2}


def back(job: JobOnNodes, number: int, since_ns: int) -> float:
    """Seconds until a node that was expelled is a spare with warm processes."""
    return noticed_s(job, number, since_ns, "spare_ready")


def test_the_majority_goes_on_and_the_minority_comes_back(network: Network) -> None:
    """Node 2 is alone, etcd is with the others. Afterwards it takes the place of node 1."""
    strikes = [Strike("forward", 2, 3, kind="wait", kept=True), Strike("after_step", 1, 6, kind="wait", kept=True)]
    store = network.directory / "store"

    def during(job: JobOnNodes) -> None:
        held(job)
        begun = time.monotonic_ns()
        network.nodes.part(2)
        noticed = noticed_s(job, 0, begun)
        stopped = ends_its_ranks(job, 2, begun)
        held(job, 1)  # three steps later: the majority goes on
        (expelled,) = job.named_of(2, "expelled")
        assert all(event["monotonic_ns"] < expelled["monotonic_ns"] for event in job.named_of(2, "persisted"))
        mended = time.monotonic_ns()
        network.nodes.join(2)
        print(f"noticed after {noticed:.2f} s, stopped after {stopped:.2f} s, a spare again {back(job, 2, mended):.2f} s after the mend")
        job.kill(1)

    job = network.run(THREE, 3, *strikes, spares=1, during=during, membership=QUICK, persistent={"url": str(store), "every_n_steps": 1})
    network.same(THREE, job, recoveries=2, lost=[1], replaced=[1, 2])
    assert "this node has left the job" in job.output(2)


@pytest.mark.campaign
def test_etcd_is_with_the_minority_until_it_is_too_late(network: Network) -> None:
    """No quorum, no job: everybody stops, and says why."""

    def during(job: JobOnNodes) -> None:
        held(job)
        begun = time.monotonic_ns()
        network.nodes.part(2, NODES)
        for number in (0, 1):
            ends_its_ranks(job, number, begun)

    limits = {**QUICK, "vacancy_timeout_s": 4.0}
    job = network.run(THREE, 3, Strike("forward", 2, 3, kind="wait", kept=True), spares=1, during=during, membership=limits)
    assert set(job.statuses.values()) <= {1, 2} and not job.ranks, job.outputs()
    for number in (0, 1, 3):
        assert "lightning-gemini: membership.etcd=" in job.output(number) and "no etcd answers" in job.output(number)
    assert "waits for a node in place of index" in job.output(2) and "membership.vacancy_timeout_s" in job.output(2)


def test_etcd_is_with_the_minority_for_a_while(network: Network) -> None:
    """Two of three nodes have lost what they had in memory: all go on from the checkpoint."""
    store = network.directory / "store"

    def during(job: JobOnNodes) -> None:
        held(job)
        job.until(lambda: bool(job.named("checkpoint")), "a checkpoint")
        begun = time.monotonic_ns()
        network.nodes.part(2, NODES)
        for number in (0, 1):
            ends_its_ranks(job, number, begun)
        network.nodes.join(2, NODES)
        (job.directory / "go").touch()

    strike = Strike("forward", 2, 5, kind="wait", kept=True)
    job = network.run(THREE, 3, strike, spares=1, during=during, membership=QUICK, persistent={"url": str(store), "every_n_steps": 3})
    network.same(THREE, job, recoveries=1, repeated=2, replaced=[0, 1])


def test_a_cut_that_is_shorter_than_the_lease_costs_nothing(network: Network) -> None:
    """But its own time."""

    def during(job: JobOnNodes) -> None:
        held(job)
        network.nodes.part(2)
        (job.directory / "go").touch()
        time.sleep(1.5)  # this is the fault: its length
        assert job.step() == 3 and not job.ranks, "nothing was cut"
        network.nodes.join(2)

    job = network.run(THREE, 3, Strike("forward", 2, 3, kind="wait"), during=during)
    network.same(THREE, job)


def test_an_agent_that_was_paused(network: Network) -> None:
    """For longer than its lease, with its ranks: when it wakes, it is told that it is not a member any more, and its ranks end."""
    strike = Strike("forward", 1, 3, kind="wait", kept=True)

    def during(job: JobOnNodes) -> None:
        held(job)
        begun = time.monotonic_ns()
        os.killpg(job.groups[1], signal.SIGSTOP)
        noticed_s(job, 0, begun, "recovered")
        woken = time.monotonic_ns()
        os.killpg(job.groups[1], signal.SIGCONT)
        assert ends_its_ranks(job, 1, woken) < 1
        held(job, 1)
        back(job, 1, woken)
        job.kill(0)

    recipe = Recipe("ddp", 2, steps=6)
    again = Strike("after_step", 0, 9, kind="wait", kept=True)
    job = network.run(recipe, 2, strike, again, spares=1, during=during, membership=QUICK)
    network.same(recipe, job, recoveries=2, lost=[0], replaced=[0, 1])


def test_only_an_agent_was_paused(network: Network) -> None:
    """Its ranks work on, and wait for those that have gone on without them. What they have completed since is in no other node's memory."""

    def during(job: JobOnNodes) -> None:
        held(job)
        begun = time.monotonic_ns()
        os.kill(job.agents[1], signal.SIGSTOP)
        noticed_s(job, 0, begun, "recovered")
        woken = time.monotonic_ns()
        os.kill(job.agents[1], signal.SIGCONT)
        assert ends_its_ranks(job, 1, woken) < 1
        back(job, 1, woken)
        (job.directory / "go").touch()

    recipe = Recipe("ddp", 2)
    strikes = [Strike("forward", 1, 3, kind="mark", kept=True), Strike("after_step", 0, 6, kind="wait")]
    job = network.run(recipe, 2, *strikes, spares=1, during=during, membership=QUICK)
    network.same(recipe, job, recoveries=1, repeated=range(2), replaced=[1])
