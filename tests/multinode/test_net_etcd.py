"""What happens to etcd happens to the job only if it lasts longer than a lease, or takes the job's keys with it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.multinode.models import Recipe, Strike
from tests.multinode.network import Network, held
from tests.support.cluster import JobOnNodes
from tests.support.storing import SLOW

DDP, FSDP = Recipe("ddp", 2), Recipe("fsdp", 2)
THREE_SERVERS = pytest.mark.parametrize("network", [3], indirect=True)
AWAY_S = 2.0
"""Shorter than the default lease."""


def go_on(job: JobOnNodes) -> None:
    """Whoever waits at a strike of kind `wait` does so no longer."""
    (job.directory / "go").touch()


def kill_one(network: Network, *, leader: bool) -> None:
    """Of three servers; the laboratory asks one that is left."""
    dead = next(server for server in network.servers if server.leads() == leader)
    dead.die()
    network.etcd = next(server for server in network.servers if server is not dead)


@THREE_SERVERS
@pytest.mark.parametrize("leader", [pytest.param(False, id="follower", marks=pytest.mark.campaign), pytest.param(True, id="leader")])
def test_a_server_dies_in_the_middle_of_the_training(network: Network, leader: bool) -> None:
    """That costs nothing, and afterwards a node is recovered as ever."""

    def during(job: JobOnNodes) -> None:
        held(job)
        kill_one(network, leader=leader)
        go_on(job)

    strikes = [Strike("forward", 0, 2, kind="wait"), Strike("forward", 1, 6, kept=True)]
    job = network.run(FSDP, 2, *strikes, spares=1, during=during)
    network.same(FSDP, job, recoveries=1, lost=[1], replaced=[1])


@THREE_SERVERS
def test_the_leading_server_dies_in_the_middle_of_a_recovery(network: Network) -> None:
    """Rank 0 does not stand still before it has died."""

    def during(job: JobOnNodes) -> None:
        held(job)
        job.kill(1)
        job.until(lambda: bool(job.named_of(0, "recover")), "a generation")
        assert not job.named("plan")
        kill_one(network, leader=True)
        go_on(job)

    job = network.run(DDP, 2, Strike("forward", 0, 3, kind="wait", kept=True), spares=1, during=during)
    network.same(DDP, job, recoveries=1, lost=[1], replaced=[1])


@THREE_SERVERS
def test_all_servers_are_away_for_a_moment(network: Network) -> None:
    """Nothing happens."""

    def during(job: JobOnNodes) -> None:
        held(job)
        for server in network.servers:
            server.pause()
        time.sleep(AWAY_S)  # this is the fault: its length
        go_on(job)
        job.until(lambda: job.step() >= 4, "steps without etcd")
        for server in network.servers:
            server.resume()

    job = network.run(DDP, 2, Strike("after_step", 0, 3, kind="wait"), during=during)
    network.same(DDP, job)


def test_etcd_is_away_for_good(network: Network) -> None:
    """All nodes stop and say what is missing."""

    def during(job: JobOnNodes) -> None:
        held(job)
        network.etcd.die()
        job.wait()
        network.etcd.restart(wiped=True)

    job = network.run(DDP, 2, Strike("forward", 0, 3, kind="wait"), spares=1, during=during, membership={"lease_ttl_s": 2})
    stopped(job)
    assert all(f"membership.etcd={network.etcd.url}: no etcd answers" in job.output(number) for number in job.groups), job.outputs()


def test_etcd_was_wiped(network: Network) -> None:
    """The job ends, on all nodes; what it has persisted stays."""
    store = network.directory / "store"

    def during(job: JobOnNodes) -> None:
        held(job)
        job.until(lambda: bool(job.named("checkpoint")), "a checkpoint")
        before = files(store)
        network.etcd.restart(wiped=True)
        job.wait()
        assert files(store) == before

    job = network.run(
        DDP, 2, Strike("forward", 0, 5, kind="wait"), spares=1, during=during, persistent={"url": str(store), "every_n_steps": 3}
    )
    stopped(job)
    assert all("is not there any more" in job.output(number) and "wiped" in job.output(number) for number in job.groups), job.outputs()


@pytest.mark.campaign
def test_etcd_comes_back_too_late(network: Network) -> None:
    """All nodes have lost their places, and what they had in memory: without a checkpoint the job ends, and says how much was lost."""

    def during(job: JobOnNodes) -> None:
        held(job)
        network.etcd.die()
        job.until(lambda: all(job.named_of(number, "expelled") for number in (0, 1)), "the expulsion of both")
        network.etcd.restart()

    job = network.run(DDP, 2, Strike("forward", 0, 3, kind="wait"), during=during, membership={"lease_ttl_s": 2})
    stopped(job)
    assert "3 completed steps are lost" in job.outputs(), job.outputs()


def test_etcd_comes_back_too_late_but_there_is_a_checkpoint(network: Network) -> None:
    """The job goes on from it, also where the nodes, who have come back, take their time to find it."""

    def during(job: JobOnNodes) -> None:
        held(job)
        job.until(lambda: bool(job.named("checkpoint")), "a checkpoint")
        (job.directory / SLOW).touch()
        network.etcd.die()
        job.until(lambda: all(job.named_of(number, "expelled") for number in (0, 1)), "the expulsion of both")
        network.etcd.restart()
        job.until(lambda: all(job.named_of(number, "assign") for number in (0, 1)), "ranks on both")
        (job.directory / SLOW).unlink()

    store = network.directory / "store"
    job = network.run(
        FSDP, 2, Strike("forward", 0, 5, kind="wait"), during=during, membership={"lease_ttl_s": 2},
        persistent={"url": str(store), "every_n_steps": 3},
    )  # fmt: skip
    network.same(FSDP, job, recoveries=1, repeated=2, replaced=[0, 1])


def stopped(job: JobOnNodes) -> None:
    """All nodes have ended with an error, and nobody has got to the end of the training."""
    assert all(job.statuses.values()) and not job.ranks, job.outputs()


def files(store: Path) -> list[str]:
    """All that are in a store."""
    return sorted(str(path.relative_to(store)) for path in store.rglob("*"))
