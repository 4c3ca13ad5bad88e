"""A changed byte is seen, wherever it changes: in the sender's memory, on the way, in a replica."""

from __future__ import annotations

import threading

import pytest

from tests.replication.helpers import CHUNK, LIMIT_S, MARK, Agent, Cluster, damage, random_bytes

MARKED = MARK * (CHUNK // len(MARK))


def through(cluster: Cluster, times: int) -> tuple[Agent, Agent]:
    """A sender and a receiver, with somebody between them who changes a byte of a block, `times` times."""
    sender, receiver = cluster.start(2)
    sender.exchange.open(1, {0: sender.peer, 1: cluster.behind(1, damage(times))}, 0)
    receiver.exchange.open(1, cluster.peers(), 1)
    return sender, receiver


def test_damage_on_the_way_is_repaired(cluster: Cluster) -> None:
    sender, receiver = through(cluster, 1)
    payload = sender.arena(0).write(1, random_bytes(3 * CHUNK, 1) + 3 * MARKED + random_bytes(5, 2))
    sender.replicate(0, 1, 1)
    assert receiver.replica(0, 1) == payload


def test_damage_on_the_way_that_comes_again_fails_and_says_where(cluster: Cluster) -> None:
    sender, receiver = through(cluster, 10**6)
    good = sender.arena(0).write(1, random_bytes(6 * CHUNK, 1))
    sender.replicate(0, 1, 1)
    sender.arenas[0].write(2, random_bytes(3 * CHUNK, 1) + 3 * MARKED)
    sender.exchange.send(0, 2, [1])
    sender.until(lambda: sender.seen.failed)
    assert "do not match their checksums, also when sent again" in sender.seen.failed[0][3] and "on the way" in sender.seen.failed[0][3]
    assert receiver.exchange.replicas() == {0: [1]} and receiver.replica(0, 1) == good
    again = sender.arenas[0].write(3, random_bytes(6 * CHUNK, 3))
    sender.replicate(0, 3, 1)
    assert receiver.replica(0, 3) == again


@pytest.mark.parametrize("position", [0, CHUNK + 5, 4 * CHUNK])
def test_damage_in_the_senders_memory_is_not_accepted(cluster: Cluster, position: int) -> None:
    sender, receiver = cluster.start(2)
    arena = sender.arena(0)
    good = arena.write(1, random_bytes(4 * CHUNK, 1))
    sender.replicate(0, 1, 1)
    arena.write(2, random_bytes(4 * CHUNK, 2))
    arena.flip(2, position)
    sender.exchange.send(0, 2, [1])
    sender.until(lambda: sender.seen.failed)
    (failed,) = sender.seen.failed
    assert failed[:3] == (0, 2, 1) and f"from byte {position // CHUNK * CHUNK} on, in the memory of this node" in failed[3]
    assert receiver.exchange.replicas() == {0: [1]} and receiver.replica(0, 1) == good
    assert sender.seen.replicated == [(0, 1, 1)]


def test_a_slot_that_is_taken_back_under_a_transfer_ends_it_and_not_the_connection(cluster: Cluster) -> None:
    sender, receiver = cluster.start(2)
    begun, go_on, passed = threading.Event(), threading.Event(), [0]

    def hold(data: bytearray) -> None:
        passed[0] += len(data)
        if passed[0] > 2 * CHUNK:
            begun.set()
            assert go_on.wait(LIMIT_S)

    sender.exchange.open(1, {0: sender.peer, 1: cluster.behind(1, hold)}, 0)
    receiver.exchange.open(1, cluster.peers(), 1)
    arena = sender.arena(0)
    arena.write(1, random_bytes(64 << 20, 1))  # more than the kernel's buffers take
    sender.exchange.send(0, 1, [1])
    assert begun.wait(LIMIT_S)
    arena.file.invalidate(arena.slot(1))
    go_on.set()
    sender.until(lambda: sender.seen.failed)
    assert sender.seen.failed == [(0, 1, 1, "the sender has stopped")] and receiver.exchange.replicas() == {}
    lanes = list(receiver.exchange._fence._open)
    payload = arena.write(2, random_bytes(CHUNK, 2))
    sender.replicate(0, 2, 1)
    assert receiver.replica(0, 2) == payload and list(receiver.exchange._fence._open) == lanes


def test_a_damaged_list_of_checksums_is_not_sent(cluster: Cluster) -> None:
    sender, receiver = cluster.start(2)
    arena = sender.arena(0)
    payload = arena.write(1, random_bytes(CHUNK, 1))
    arena.flip(1, -(-len(payload) // 8) * 8 + 30)
    sender.exchange.send(0, 1, [1])
    sender.until(lambda: sender.seen.failed)
    assert "the list of checksums does not match its slot" in sender.seen.failed[0][3] and receiver.exchange.replicas() == {}
