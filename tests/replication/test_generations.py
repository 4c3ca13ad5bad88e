"""What belongs to an older generation is refused; who is late or early waits, or is told."""

from __future__ import annotations

import select
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from lightning_gemini.peers.errors import StaleGeneration
from lightning_gemini.replication.fence import Peer
from tests.replication.helpers import CHUNK, LIMIT_S, Agent, Cluster, random_bytes


def test_generations_only_grow(cluster: Cluster) -> None:
    first, _ = cluster.start(2)
    cluster.open(3)
    with pytest.raises(StaleGeneration, match="generation 2 is over, 3 has begun"):
        first.exchange.open(2, cluster.peers(), 0)


def test_who_wakes_late_harms_nobody(cluster: Cluster) -> None:
    """It sleeps in a transfer while the others go on without it."""
    sleeper, receiver, third = cluster.start(3)
    arena = sleeper.arena(0)
    old = arena.write(1, random_bytes(CHUNK, 1))
    sleeper.replicate(0, 1, 1)
    receiver.exchange.open(1, {1: receiver.peer, 2: third.peer}, 1)
    third.exchange.open(1, {1: receiver.peer, 2: third.peer}, 2)
    arena.write(2, random_bytes(CHUNK, 2))
    sleeper.exchange.send(0, 2, [1])
    sleeper.until(lambda: any("generation 0 is over, 1 has begun" in text for text in sleeper.seen.news))
    assert receiver.exchange.replicas() == {0: [1]} and receiver.replica(0, 1) == old
    assert sleeper.seen.replicated == [(0, 1, 1)]


def test_a_transfer_under_way_is_not_committed_after_its_generation(cluster: Cluster) -> None:
    """Held on its way until the receiver has begun the next one, then let through: also a commit at the last moment is refused."""
    sender, receiver = cluster.start(2)
    arrived, go_on = threading.Event(), threading.Event()
    passed = [0]

    def hold(data: bytearray) -> None:
        passed[0] += len(data)
        if passed[0] > 10 * CHUNK:
            arrived.set()
            assert go_on.wait(LIMIT_S)

    sender.exchange.open(1, {0: sender.peer, 1: cluster.behind(1, hold)}, 0)
    receiver.exchange.open(1, cluster.peers(), 1)
    sender.arena(0).write(1, random_bytes(20 * CHUNK, 1))
    sender.exchange.send(0, 1, [1])
    assert arrived.wait(LIMIT_S)
    receiver.exchange.open(2, cluster.peers(), 1)
    go_on.set()
    sender.until(lambda: any("2 has begun" in text for text in sender.seen.news))
    assert receiver.exchange.replicas() == {} and sender.seen.replicated == []


def test_who_is_early_waits_at_the_door(cluster: Cluster) -> None:
    first, second = cluster.start(2)
    payload = first.arena(0).write(1, random_bytes(CHUNK, 1))
    first.exchange.open(1, cluster.peers(), 0)
    first.exchange.send(0, 1, [1])
    with ThreadPoolExecutor() as pool:
        control = pool.submit(first.exchange.connect_control, 1)
        second.until(lambda: len(second.exchange._door._callers) == 2)
        assert not control.done() and not second.seen.news
        second.exchange.open(1, cluster.peers(), 1)
        control.result(LIMIT_S).close()
    first.until(lambda: first.seen.replicated)
    second.until(lambda: second.seen.controls)
    assert second.replica(0, 1) == payload


def test_who_waited_for_a_generation_that_was_skipped_is_told(cluster: Cluster) -> None:
    first, second = cluster.start(2)
    first.exchange.open(1, cluster.peers(), 0)
    with ThreadPoolExecutor() as pool:
        control = pool.submit(first.exchange.connect_control, 1)
        second.until(lambda: second.exchange._door._callers)
        second.exchange.open(2, cluster.peers(), 1)
        with pytest.raises(StaleGeneration, match="generation 1 is over, 2 has begun"):
            control.result(LIMIT_S)


def test_a_vacant_place_is_filled_in_the_same_generation(cluster: Cluster) -> None:
    """Nothing that is under way is disturbed, and the newcomer is let in as soon as it is known."""
    first, second = cluster.start(2)
    first.arena(0).write(1, random_bytes(CHUNK, 1))
    first.replicate(0, 1, 1)
    lanes = list(second.exchange._fence._open)
    new = cluster.add()
    roster = {**cluster.peers(), 2: new.peer}
    new.exchange.open(0, roster, 2)
    payload = new.arena(4).write(1, random_bytes(CHUNK, 4))
    new.exchange.send(4, 1, [1])
    second.until(lambda: second.exchange._door._callers)
    for index, agent in enumerate((first, second)):
        agent.exchange.open(0, roster, index)
    new.until(lambda: new.seen.replicated)
    assert second.replica(4, 1) == payload
    assert list(second.exchange._fence._open)[: len(lanes)] == lanes
    first.exchange.send(0, 1, [1, 2])
    first.until(lambda: (0, 1, 2) in first.seen.replicated)


def test_acknowledgements_are_kept_for_nodes_that_stay(cluster: Cluster) -> None:
    first, second, third = cluster.start(3)
    first.arena(0).write(1, random_bytes(CHUNK, 1))
    first.exchange.send(0, 1, [1, 2])
    first.until(lambda: len(first.seen.replicated) == 2)
    new = cluster.add()
    cluster.open(1, [first, new, third])
    assert (first.exchange.acknowledged(0, 1), first.exchange.acknowledged(0, 2)) == (-1, 1)
    assert third.exchange.replicas() == {0: [1]}
    first.exchange.send(0, 1, [1, 2])
    first.until(lambda: len(first.seen.replicated) == 4)
    assert new.exchange.replicas() == {0: [1]} and second.exchange.replicas() == {0: [1]}


def test_requests_end_with_their_generation(cluster: Cluster) -> None:
    first, second = cluster.start(2)
    first.exchange.open(1, {0: first.peer, 1: cluster.behind(1, listen=False)}, 0)
    first.arena(0).write(1, random_bytes(CHUNK, 1))
    first.exchange.send(0, 1, [1])
    assert first.exchange.lag()
    cluster.open(2)
    assert first.exchange.lag() == {}
    first.replicate(0, 1, 1)
    assert second.exchange.replicas() == {0: [1]}


def talk(first: socket.socket, second: socket.socket) -> None:
    for source, target in ((first, second), (second, first)):
        source.sendall(b"word")
        target.settimeout(LIMIT_S)
        assert target.recv(9) == b"word"


def _until_handed(agent: Agent) -> None:
    assert select.select([agent.exchange.fileno()], [], [], LIMIT_S)[0]


def test_the_agents_own_line(cluster: Cluster) -> None:
    first, second = cluster.start(2)
    sock = first.exchange.connect_control(1)
    with sock:
        second.until(lambda: second.seen.controls)
        ((index, node, other),) = second.seen.controls
        assert (index, node) == (0, first.node) and sock.getblocking() and other.getblocking()
        talk(sock, other)
        cluster.open(1)
        talk(sock, other)  # it is the agents', and ends when they end it


def test_a_line_of_an_older_generation_is_not_handed_over(cluster: Cluster) -> None:
    first, second = cluster.start(2)
    with first.exchange.connect_control(1) as sock:
        _until_handed(second)
        second.exchange.open(1, cluster.peers(), 1)
        second.exchange.poll()
        assert not second.seen.controls
        sock.settimeout(LIMIT_S)
        assert sock.recv(1) == b""


def test_a_line_that_nobody_took_is_closed(cluster: Cluster) -> None:
    first, second = cluster.start(2)
    with first.exchange.connect_control(1) as sock:
        _until_handed(second)
        second.close()
        cluster.all.remove(second)
        sock.settimeout(LIMIT_S)
        assert sock.recv(1) == b""


def test_everything_closes_while_it_is_busy(cluster: Cluster) -> None:
    """Transfers, a silent peer, a fetch that waits; the leak police looks at threads and descriptors."""
    for _ in range(5):
        first, second = cluster.start(2)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            first.exchange.open(1, {**cluster.peers(), 2: Peer("silent", "127.0.0.1", silent.getsockname()[1])}, 0)
            second.exchange.open(1, cluster.peers(), 1)
            first.arena(0).write(1, random_bytes(200 * CHUNK, 1))
            first.exchange.send(0, 1, [1, 2])
            results = first.exchange.fetch_results(2, 0, {})
            cluster.close()
            assert isinstance(results.exception(LIMIT_S), (StaleGeneration, OSError))
        cluster.all.clear()
