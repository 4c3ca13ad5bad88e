"""Keys spread over nine ranks: they are found, they are counted right, and a key that all read costs its owner little."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from math import ceil, log2

import pytest

from lightning_gemini.peers import wire
from lightning_gemini.peers.node import PeerNode
from tests.support.peers import Peers, at_once

WORLD = 9


@pytest.fixture
def nodes(peers: Peers) -> list[PeerNode]:
    return peers.world(WORLD)


def get(node: PeerNode, key: str) -> bytes:
    value: bytes = node.call(0, wire.Get(key))[1]
    return value


def reading(nodes: list[PeerNode], key: str) -> list[Callable[[], bytes]]:
    return [lambda node=node: get(node, key) for node in nodes]  # type: ignore[misc]


def owner(nodes: list[PeerNode], key: str) -> PeerNode:
    return nodes[nodes[0]._now.keys.owner(key)]


def test_what_one_sets_all_get(nodes: list[PeerNode]) -> None:
    for number, node in enumerate(nodes):
        node.call(0, wire.Put(f"k{number}", b"\0%d" % number))
    for number in range(WORLD):
        assert at_once(reading(nodes, f"k{number}")) == [b"\0%d" % number] * WORLD


def test_keys_are_spread(nodes: list[PeerNode]) -> None:
    assert {owner(nodes, f"key {number}").rank for number in range(200)} == set(range(WORLD))


def test_all_ranks_agree_on_the_owner(nodes: list[PeerNode]) -> None:
    assert len({node._now.keys.owner("nccl id") for node in nodes}) == 1


def test_a_get_before_the_set_waits(nodes: list[PeerNode]) -> None:
    asked = [threading.Event() for _ in nodes]
    returned = threading.Event()
    got: list[bytes] = []

    def read(node: PeerNode) -> None:
        asked[node.rank].set()
        got.append(get(node, "late"))
        returned.set()

    readers = [threading.Thread(target=read, args=(node,)) for node in nodes]
    for thread, event in zip(readers, asked, strict=True):
        thread.start()
        assert event.wait(5)
    assert not returned.wait(0.1), "a get returned before there was a value"
    nodes[4].call(0, wire.Put("late", b"there"))
    for thread in readers:
        thread.join(5)
    assert got == [b"there"] * WORLD


def test_a_get_has_a_deadline(nodes: list[PeerNode]) -> None:
    with pytest.raises(TimeoutError):
        nodes[0].call(0, wire.Get("never"), timeout_s=0.1)
    assert nodes[0].call(0, wire.Check("never")) is False


@pytest.mark.parametrize("key", ["a", "b", "c", "d"])
def test_a_key_that_all_read_costs_no_rank_more_than_log2_requests(nodes: list[PeerNode], key: str) -> None:
    home = owner(nodes, key)
    home.call(0, wire.Put(key, b"id"))
    before = [node.requests for node in nodes]
    assert at_once(reading(nodes, key)) == [b"id"] * WORLD
    served = [node.requests - count for node, count in zip(nodes, before, strict=True)]
    assert sum(served) == WORLD - 1
    assert served[home.rank] == max(served) == ceil(log2(WORLD))
    assert at_once(reading(nodes, key)) == [b"id"] * WORLD
    assert sum(node.requests for node in nodes) == sum(before) + WORLD - 1, "a second read must cost nothing"


def test_check(nodes: list[PeerNode]) -> None:
    assert [node.call(0, wire.Check("k")) for node in nodes] == [False] * WORLD
    nodes[3].call(0, wire.Put("k", b""))
    assert [node.call(0, wire.Check("k")) for node in nodes] == [True] * WORLD


def test_append(nodes: list[PeerNode]) -> None:
    for node in nodes:
        node.call(0, wire.Append("log", b"%d," % node.rank))
    assert at_once(reading(nodes, "log")) == [b"0,1,2,3,4,5,6,7,8,"] * WORLD


def test_compare_set(nodes: list[PeerNode]) -> None:
    ask = [(b"x", b"y", b"x"), (b"", b"one", b"one"), (b"", b"two", b"one"), (b"one", b"two", b"two"), (b"one", b"three", b"two")]
    for number, (expected, desired, answer) in enumerate(ask):
        assert nodes[number].call(0, wire.CompareSet("k", expected, desired)) == answer
    assert get(nodes[8], "k") == b"two"


def test_only_one_of_many_compare_sets_wins(nodes: list[PeerNode]) -> None:
    claims = [lambda node=node: node.call(0, wire.CompareSet("leader", b"", b"%d" % node.rank)) for node in nodes]  # type: ignore[misc]
    winners = at_once(claims)
    assert len(set(winners)) == 1 and winners[0] == get(nodes[0], "leader")


def test_delete(nodes: list[PeerNode]) -> None:
    nodes[1].call(0, wire.Put("k", b"v"))
    at_once(reading(nodes, "k"))  # copies everywhere
    assert nodes[2].call(0, wire.Delete("k")) is True
    assert nodes[3].call(0, wire.Delete("k")) is False
    assert nodes[4].call(0, wire.Check("k")) is False
    for node in nodes:
        with pytest.raises(TimeoutError):
            node.call(0, wire.Get("k"), timeout_s=0.05)
    nodes[5].call(0, wire.Put("k", b"again"))
    assert at_once(reading(nodes, "k")) == [b"again"] * WORLD


def test_concurrent_adds_sum_up(nodes: list[PeerNode]) -> None:
    def count(node: PeerNode) -> list[int]:
        return [node.call(0, wire.Add("n", node.rank)) for _ in range(30)]

    sums = [total for totals in at_once([lambda node=node: count(node) for node in nodes]) for total in totals]  # type: ignore[misc]
    assert max(sums) == 30 * sum(range(WORLD)) == nodes[0].call(0, wire.Add("n", 0))
    assert int(get(nodes[5], "n")) == max(sums)


def test_an_add_to_what_is_no_number_reaches_the_asker_as_an_error(nodes: list[PeerNode]) -> None:
    nodes[0].call(0, wire.Put("k", b"text"))
    for node in nodes:
        with pytest.raises((ValueError, RuntimeError), match="invalid literal"):
            node.call(0, wire.Add("k", 1))
    assert get(nodes[1], "k") == b"text"


def test_a_large_value_arrives(nodes: list[PeerNode]) -> None:
    value = random.Random(1).randbytes(5 << 20)
    nodes[0].call(0, wire.Put("large", value))
    assert get(owner(nodes, "large"), "large") == get(nodes[7], "large") == value
