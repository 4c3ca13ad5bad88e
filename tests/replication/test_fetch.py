"""Arenas are refilled from replicas and twins, from several at once, past damaged blocks and dead nodes; or the reason is told."""

from __future__ import annotations

import os
import threading

import pytest

from lightning_gemini.peers.errors import StaleGeneration
from lightning_gemini.replication import fetching
from lightning_gemini.replication import refill as refill_module
from lightning_gemini.replication.refill import Impossible, Want
from lightning_gemini.snapshot.collective_log import CollectiveLog
from lightning_gemini.snapshot.slots import SlotFile
from tests.replication.helpers import CHUNK, LIMIT_S, MARK, Agent, Arena, Cluster, Tamper, damage, random_bytes, untouched, verified

TRAVEL, SHARED = 40 * CHUNK + 11, 90 * CHUNK + 5


def kept(cluster: Cluster, *, key: str = "", shared: int = 0) -> bytes:
    """Rank 0 of node 0 has a snapshot of step 5, which nodes 1 and 2 keep; node 3 is its replacement to be. Returns the payload."""
    cluster.start(4)
    owner = cluster.agents[0]
    data = random_bytes(shared, "shared")
    payload = owner.arena(0).write(5, random_bytes(TRAVEL, "travel"), data, key=key, local=b"rng" * 50)
    for index in (1, 2):
        owner.replicate(0, 5, index)
        if shared:  # as a twin of another rank has it
            twin = cluster.agents[index].arena(10 + index)
            twin.write(5, random_bytes(7 * CHUNK + index, index), data, key=key, local=b"other" * index)
    return payload


def damage_replica(agent: Agent, position: int, rank: int = 0) -> None:
    """Change a byte of the replica that an agent keeps."""
    found = agent.exchange._store.find(rank, 5)
    assert found is not None
    with found[0].payload(found[1].place) as view:
        view[position] ^= 1


def fetch(agent: Agent, arena: Arena, travel: tuple[int, ...], shared: tuple[tuple[int, int], ...] = ()) -> bytes:
    """What is in the arena then, verified."""
    agent.exchange.fetch([Want(0, 5, arena.fd, travel, shared)]).result(LIMIT_S)
    file = SlotFile(arena.fd)
    try:
        return verified(file, 5)
    finally:
        file.close()


@pytest.mark.parametrize("sources", [(1,), (2, 1), (1, 2, 0)])
def test_an_empty_arena_is_filled_from_replicas(cluster: Cluster, sources: tuple[int, ...]) -> None:
    payload = kept(cluster)
    new = cluster.agents[3]
    assert fetch(new, new.arena(0), sources) == payload


def test_a_payload_is_put_together_from_a_replica_and_twins(cluster: Cluster) -> None:
    payload = kept(cluster, key="k", shared=SHARED)
    new = cluster.agents[3]
    assert fetch(new, new.arena(0), (1, 2), ((1, 11), (2, 12))) == payload
    assert fetch(new, new.arena(0), (2,), ((1, 11),)) == payload


def test_this_nodes_own_replica_needs_no_network(cluster: Cluster) -> None:
    payload = kept(cluster, key="k", shared=SHARED)
    keeper = cluster.agents[1]
    for agent in cluster.agents:
        if agent is not keeper:
            agent.close()
    cluster.all = [keeper]
    arena = keeper.arena(0)
    assert fetch(keeper, arena, (1,), ((1, 11),)) == payload


def test_a_damaged_snapshot_is_replaced_from_this_nodes_own_replica(cluster: Cluster) -> None:
    """The rank has moved here, to the node that kept its replica, and what is in its arena cannot be used."""
    payload = kept(cluster)
    keeper = cluster.agents[1]
    arena = keeper.arena(0)
    arena.write(5, random_bytes(TRAVEL, "travel"), local=b"rng" * 50)
    arena.flip(5, CHUNK)
    assert fetch(keeper, arena, (1,)) == payload


def test_a_source_that_is_in_no_roster(cluster: Cluster) -> None:
    payload = kept(cluster)
    new = cluster.agents[3]
    assert fetch(new, new.arena(0), (9, 1)) == payload
    with pytest.raises(Impossible, match="node 9: no node has index 9 in generation 0"):
        fetch(new, new.arena(0), (9,))


def test_an_arena_keeps_its_other_slot(cluster: Cluster) -> None:
    payload = kept(cluster)
    new = cluster.agents[3]
    arena = new.arena(0, 60 * CHUNK)
    older = arena.write(4, random_bytes(CHUNK, "older"))
    assert fetch(new, arena, (1,)) == payload
    assert verified(arena.file, 4) == older


def test_several_arenas_at_once(cluster: Cluster) -> None:
    first, second, new = cluster.start(3)
    payloads = {}
    for rank in range(4):
        payloads[rank] = first.arena(rank).write(5, random_bytes((rank + 1) * 9 * CHUNK, rank))
        first.replicate(rank, 5, 1)
    wants = [Want(rank, 5, new.arena(rank).fd, (0, 1)) for rank in range(4)]
    new.exchange.fetch(wants).result(LIMIT_S)
    for rank, payload in payloads.items():
        file = SlotFile(new.arenas[rank].fd)
        assert verified(file, 5) == payload
        file.close()
    new.exchange.fetch([]).result(LIMIT_S)


@pytest.mark.parametrize("position", [3, CHUNK, TRAVEL])
def test_a_block_damaged_in_one_replica_comes_from_the_other(cluster: Cluster, position: int) -> None:
    payload = kept(cluster)
    new = cluster.agents[3]
    damage_replica(cluster.agents[1], position)
    assert fetch(new, new.arena(0), (1, 2)) == payload


def test_each_replica_has_other_damage(cluster: Cluster) -> None:
    payload = kept(cluster)
    new = cluster.agents[3]
    damage_replica(cluster.agents[1], 10 * CHUNK)
    damage_replica(cluster.agents[2], 20 * CHUNK)
    assert fetch(new, new.arena(0), (1, 2)) == payload


def test_damage_in_a_twin_and_on_the_way(cluster: Cluster) -> None:
    payload = kept(cluster, key="k", shared=SHARED)
    new = cluster.agents[3]
    cluster.agents[1].arenas[11].flip(5, 60 * CHUNK)
    assert fetch(new, new.arena(0), (1, 2), ((1, 11), (2, 12))) == payload


def test_damage_on_the_way_from_the_only_source_is_repaired(cluster: Cluster) -> None:
    owner, new = cluster.start(2)
    payload = owner.arena(0).write(5, random_bytes(9 * CHUNK, 1) + MARK * 4096 + random_bytes(9 * CHUNK, 2))
    new.exchange.open(1, {0: cluster.behind(0, untouched, damage(1)), 1: new.peer}, 1)
    owner.exchange.open(1, cluster.peers(), 0)
    assert fetch(new, new.arena(0), (0,)) == payload


def test_damage_everywhere_fails_and_names_it(cluster: Cluster) -> None:
    kept(cluster)
    new = cluster.agents[3]
    for index in (1, 2):
        damage_replica(cluster.agents[index], 10 * CHUNK + 3)
    with pytest.raises(Impossible) as error:
        fetch(new, new.arena(0), (1, 2))
    assert f"travelling part of rank 0, step 5, byte {10 * CHUNK}, cannot be brought back: node" in str(error.value)
    assert "node 1: the checksum" in str(error.value) and "node 2: the checksum" in str(error.value)
    assert SlotFile(new.arenas[0].fd).slots() == []


def test_nobody_has_it(cluster: Cluster) -> None:
    kept(cluster)
    new = cluster.agents[3]
    with pytest.raises(Impossible, match="rank 0, step 6, cannot be brought back: node 1: rank 0 has no snapshot of step 6 here"):
        new.exchange.fetch([Want(0, 6, new.arena(0).fd, (1,))]).result(LIMIT_S)
    with pytest.raises(Impossible, match="rank 0, step 5, cannot be brought back: no source was named"):
        new.exchange.fetch([Want(0, 5, new.arena(0).fd, ())]).result(LIMIT_S)


def test_the_shared_part_has_no_source(cluster: Cluster) -> None:
    kept(cluster, key="k", shared=SHARED)
    new = cluster.agents[3]
    with pytest.raises(Impossible, match="the shared part of rank 0, step 5, cannot be brought back: no source was named"):
        fetch(new, new.arena(0), (1, 2))


def test_a_rank_with_another_key_is_no_twin(cluster: Cluster) -> None:
    payload = kept(cluster, key="k", shared=SHARED)
    new, false = cluster.agents[3], cluster.agents[1]
    false.arena(11).write(5, b"t", random_bytes(SHARED, "other"), key="another")
    assert fetch(new, new.arena(0), (1, 2), ((1, 11), (2, 12))) == payload
    with pytest.raises(Impossible, match="node 1: rank 11 is no twin: its key is 'another', not 'k'"):
        fetch(new, new.arena(0), (1, 2), ((1, 11),))


def test_twins_that_differ_are_not_mixed(cluster: Cluster) -> None:
    """One of them breaks the contract; whichever is asked first is believed, but no payload is made of both."""
    payload = kept(cluster, key="k", shared=SHARED)
    new, false = cluster.agents[3], cluster.agents[1]
    other = random_bytes(SHARED, "other")
    false.arena(11).write(5, b"t", other, key="k")
    found = fetch(new, new.arena(0), (1, 2), ((1, 11), (2, 12)))
    assert found in (payload, payload[: -len(other)] + other)


def after(event: threading.Event) -> Tamper:
    """Let nothing but the first description through before something has happened."""
    passed = [0]

    def tamper(data: bytearray) -> None:
        passed[0] += len(data)
        if passed[0] > CHUNK:
            assert event.wait(LIMIT_S)

    return tamper


def from_two(cluster: Cluster, first: Tamper, second: Tamper) -> bytes:
    """Fetch from nodes 1 and 2, through somebody who does something to what they send."""
    new = cluster.agents[3]
    peers = {**cluster.peers(), 1: cluster.behind(1, untouched, first), 2: cluster.behind(2, untouched, second)}
    for index, agent in enumerate(cluster.agents):
        agent.exchange.open(1, peers if agent is new else cluster.peers(), index)
    return fetch(new, new.arena(0), (1, 2))


def test_two_sources_share_the_work(cluster: Cluster) -> None:
    """Neither brings its third block before the other has brought one."""
    payload = kept(cluster)
    begun = [threading.Event(), threading.Event()]
    passed = [0, 0]

    def together(number: int) -> Tamper:
        def tamper(data: bytearray) -> None:
            passed[number] += len(data)
            if passed[number] > CHUNK:
                begun[number].set()
            if passed[number] > 2 * CHUNK:
                assert begun[1 - number].wait(LIMIT_S)

        return tamper

    assert from_two(cluster, together(0), together(1)) == payload
    assert min(passed) > CHUNK and len(payload) < sum(passed) < len(payload) * 1.05


def test_a_source_that_dies_is_replaced(cluster: Cluster) -> None:
    payload = kept(cluster)
    dead, passed = threading.Event(), [0]

    def dies(data: bytearray) -> None:
        passed[0] += len(data)
        if passed[0] > 3 * CHUNK:
            cluster.proxies[0].cut()
            dead.set()

    assert from_two(cluster, dies, after(dead)) == payload
    assert dead.is_set()


def test_a_source_that_stands_still_is_given_up(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "STALL_S", 0.3)
    payload = kept(cluster)
    stands, over, passed = threading.Event(), threading.Event(), [0]

    def stops(data: bytearray) -> None:
        passed[0] += len(data)
        if passed[0] > 3 * CHUNK:
            stands.set()
            over.wait(LIMIT_S)

    try:
        assert from_two(cluster, stops, after(stands)) == payload
    finally:
        over.set()
    assert stands.is_set()


def test_a_fetch_ends_with_its_generation(cluster: Cluster) -> None:
    """A source is told of in the roster, but never begins the generation."""
    kept(cluster)
    new = cluster.agents[3]
    new.exchange.open(1, cluster.peers(), 3)
    future = new.exchange.fetch([Want(0, 5, new.arena(0).fd, (1, 2))])
    assert not future.done()
    new.exchange.open(2, cluster.peers(), 3)
    with pytest.raises(StaleGeneration):
        future.result(LIMIT_S)


def test_no_memory_for_an_arena(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(cluster)
    new = cluster.agents[3]
    monkeypatch.setattr(refill_module, "available_memory", lambda: 1 << 20)
    with pytest.raises(MemoryError, match="two snapshot slots of rank 0 need 6 MiB, 1 MiB of memory are available"):
        fetch(new, new.arena(0), (1, 2))


def test_the_agents_loop_is_woken(cluster: Cluster) -> None:
    kept(cluster)
    new = cluster.agents[3]
    future = new.exchange.fetch([Want(0, 5, new.arena(0).fd, (1, 2))])
    new.until(future.done)


@pytest.mark.parametrize("size", [0, 100, 9 << 20])
def test_results_of_collectives(cluster: Cluster, size: int) -> None:
    here, there = cluster.start(2)
    fd = os.memfd_create("log", os.MFD_CLOEXEC)
    log = CollectiveLog(fd)
    try:
        log.allocate(size + (1 << 16))
        log.rotate({})
        for index in range(3):
            log.append("default", index, b"r%d" % index)
        log.append("other", 7, random_bytes(size, 1))
        log.append("other", 8, bytes(1 << 20))  # does not fit
        there.exchange.hold_logs({4: fd})
        found = here.exchange.fetch_results(1, 4, {"default": 1, "other": 0, "absent": 0}).result(LIMIT_S)
        assert found == {("default", 1): b"r1", ("default", 2): b"r2", ("other", 7): random_bytes(size, 1), ("other", 8): None}
        with pytest.raises(LookupError, match="rank 5 keeps no log of collectives here"):
            here.exchange.fetch_results(1, 5, {}).result(LIMIT_S)
    finally:
        log.close()
        os.close(fd)
