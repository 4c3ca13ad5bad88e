"""Snapshots get to other nodes whole, are acknowledged after they are kept, and slow or dead nodes hold nobody up."""

from __future__ import annotations

import time

import pytest

from lightning_gemini.replication import store as store_module
from tests.replication.helpers import CHUNK, Cluster, random_bytes


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 20 * CHUNK + 7])
def test_a_replica_is_equal_to_the_travelling_part(cluster: Cluster, size: int) -> None:
    sender, receiver = cluster.start(2)
    payload = sender.arena(0).write(7, random_bytes(size, size), b"shared" * 99, key="k", local=b"rng")
    sender.replicate(0, 7, 1)
    kept = receiver.replica(0, 7)
    assert payload.startswith(kept) and len(kept) == len(payload) - 6 * 99
    assert receiver.exchange.replicas() == {0: [7]} and sender.exchange.replicas() == {}
    assert sender.exchange.acknowledged(0, 1) == 7 and sender.exchange.lag() == {}


def test_all_ranks_of_a_ring_at_once_in_both_directions(cluster: Cluster) -> None:
    agents = cluster.start(3)
    payloads = {}
    for index, agent in enumerate(agents):
        for rank in (2 * index, 2 * index + 1):
            payloads[rank] = agent.arena(rank).write(1, random_bytes(5 * CHUNK, rank))
    for index, agent in enumerate(agents):
        for rank in agent.arenas:
            agent.exchange.send(rank, 1, [(index + 1) % 3, (index + 2) % 3])
    for agent in agents:
        agent.until(lambda agent=agent: len(agent.seen.replicated) == 4)  # type: ignore[misc]
    for index, agent in enumerate(agents):
        others = [rank for rank in payloads if rank // 2 != index]
        assert {rank: agent.replica(rank, 1) for rank in others} == {rank: payloads[rank] for rank in others}


def test_the_two_newest_versions_are_kept(cluster: Cluster) -> None:
    sender, receiver = cluster.start(2)
    arena = sender.arena(3)
    payloads = {}
    for step in range(1, 6):
        payloads[step] = arena.write(step, random_bytes(3 * CHUNK, step))
        sender.replicate(3, step, 1)
        assert receiver.exchange.replicas() == {3: [step - 1, step][step == 1 :]}
    assert {step: receiver.replica(3, step) for step in (4, 5)} == {step: payloads[step] for step in (4, 5)}


def test_a_snapshot_that_has_outgrown_its_slot_leaves_the_older_one_whole(cluster: Cluster) -> None:
    sender, receiver = cluster.start(2)
    arena = sender.arena(0, 64 * CHUNK)
    small = arena.write(1, random_bytes(2 * CHUNK, 1))
    sender.replicate(0, 1, 1)
    large = arena.write(2, random_bytes(40 * CHUNK, 2))
    sender.replicate(0, 2, 1)
    assert (receiver.replica(0, 1), receiver.replica(0, 2)) == (small, large)


def test_what_is_there_already_is_not_sent_again(cluster: Cluster) -> None:
    sender, receiver = cluster.start(2)
    sender.arena(0).write(1, random_bytes(CHUNK, 1))
    sender.replicate(0, 1, 1)
    sequence = receiver.exchange._store.find(0, 1)[1].sequence  # type: ignore[index]
    sender.exchange.send(0, 1, [1])
    sender.until(lambda: len(sender.seen.replicated) == 2)
    assert receiver.exchange._store.find(0, 1)[1].sequence == sequence  # type: ignore[index]


def test_the_same_step_with_other_bytes_is_another_version(cluster: Cluster) -> None:
    """It was made again after a recovery."""
    sender, receiver = cluster.start(2)
    arena = sender.arena(0)
    arena.write(1, random_bytes(CHUNK, "first"))
    sender.replicate(0, 1, 1)
    again = arena.write(1, random_bytes(CHUNK, "second"))
    sender.exchange.send(0, 1, [1])
    sender.until(lambda: len(sender.seen.replicated) == 2)
    assert receiver.replica(0, 1) == again


def test_no_memory_is_refused_with_the_figures_and_nothing_is_lost(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    sender, receiver = cluster.start(2)
    arena = sender.arena(0, 64 * CHUNK)
    small = arena.write(1, random_bytes(CHUNK, 1))
    sender.replicate(0, 1, 1)
    monkeypatch.setattr(store_module, "available_memory", lambda: 1 << 20)
    arena.write(2, random_bytes(40 * CHUNK, 2))
    sender.exchange.send(0, 2, [1])
    sender.until(lambda: sender.seen.failed)
    ((rank, step, index, why),) = sender.seen.failed
    assert (rank, step, index) == (0, 2, 1) and "replicas of rank 0 need 5 MiB, 1 MiB of memory are available: keep fewer" in why
    assert receiver.exchange.replicas() == {0: [1]} and receiver.replica(0, 1) == small
    arena.write(3, random_bytes(CHUNK, 3))
    sender.replicate(0, 3, 1)  # the connection is good, and a smaller one fits


def test_a_step_that_is_not_committed_is_reported(cluster: Cluster) -> None:
    sender, _ = cluster.start(2)
    sender.arena(0).write(1, b"x")
    sender.exchange.send(0, 2, [1])
    sender.until(lambda: sender.seen.failed)
    assert "rank 0 has no committed snapshot of step 2" in sender.seen.failed[0][3]


def test_targets_are_other_nodes_of_the_roster(cluster: Cluster) -> None:
    sender, _ = cluster.start(2)
    for index in (0, 2):
        with pytest.raises(ValueError, match=f"targets: index {index} is not that of another node of generation 0"):
            sender.exchange.send(0, 1, [index])


def test_a_node_that_does_not_answer_holds_nobody_up_and_gets_the_newest_when_it_does(cluster: Cluster) -> None:
    first, _, late = cluster.start(3)
    absent = cluster.behind(2, listen=False)
    first.exchange.open(1, {**cluster.peers(), 2: absent}, 0)
    for index in (1, 2):
        cluster.agents[index].exchange.open(1, cluster.peers(), index)
    arena = first.arena(0)
    for step in (1, 2, 3):
        arena.write(step, random_bytes(CHUNK, step))
        begun = time.monotonic()
        first.exchange.send(0, step, [1, 2])
        assert time.monotonic() - begun < 0.5
        first.until(lambda step=step: (0, step, 1) in first.seen.replicated)  # type: ignore[misc]
    first.until(lambda: first.seen.news)
    lag = first.exchange.lag()
    assert set(lag) == {(0, 2)} and lag[0, 2].wanted == 3 and lag[0, 2].acknowledged == -1 and lag[0, 2].behind_s > 0
    cluster.proxies[0].listen()
    first.until(lambda: (0, 3, 2) in first.seen.replicated)
    assert first.exchange.lag() == {} and late.exchange.replicas() == {0: [3]}
    assert len([text for text in first.seen.news if late.node in text]) == 1, "one line, not one for each attempt"


def test_a_connection_that_breaks_is_made_again(cluster: Cluster) -> None:
    sender, receiver = cluster.start(2)
    arena = sender.arena(0)
    arena.write(1, random_bytes(CHUNK, 1))
    sender.replicate(0, 1, 1)
    for lane in list(receiver.exchange._fence._open):
        lane.shut()
    payload = arena.write(2, random_bytes(CHUNK, 2))
    sender.replicate(0, 2, 1)
    assert receiver.replica(0, 2) == payload


def test_replicas_can_be_dropped_and_forgotten(cluster: Cluster) -> None:
    sender, receiver = cluster.start(2)
    for rank in (0, 1):
        for step in (4, 5):
            sender.arenas.get(rank, None) or sender.arena(rank, 4 * CHUNK)
            sender.arenas[rank].write(step, random_bytes(CHUNK, (rank, step)))
            sender.replicate(rank, step, 1)
    for agent in cluster.agents:
        agent.exchange.forget_after(4)
    assert receiver.exchange.replicas() == {0: [4], 1: [4]} and sender.exchange.acknowledged(0, 1) == 4
    receiver.exchange.drop([1])
    assert receiver.exchange.replicas() == {0: [4]}
    receiver.exchange.drop([0, 9])
    assert receiver.exchange.replicas() == {}
