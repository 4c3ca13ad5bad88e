"""The store by itself: its limits of time, what it does not offer, and that all kinds of calls reach the same keys."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch.distributed as dist

from lightning_gemini.peers.node import PeerNode
from lightning_gemini.rendezvous.store import PeerStore
from tests.support.peers import LIMIT_S, Peers, at_once

GROUP = "default_pg//cpu//0/"
SHORT = timedelta(seconds=0.3)


@pytest.fixture
def nodes(peers: Peers) -> list[PeerNode]:
    return peers.world(3)


@pytest.fixture
def stores(nodes: list[PeerNode]) -> list[PeerStore]:
    return [PeerStore(node) for node in nodes]


def test_keys_of_one_are_the_keys_of_all(stores: list[PeerStore]) -> None:
    a, b, c = stores
    a.set("text", "ü")
    b.set("bytes", b"\0\1")
    assert (c.get("text"), c.get("bytes")) == ("ü".encode(), b"\0\1")
    assert [store.add("n", number) for number, store in enumerate(stores)] == [0, 1, 3]
    a.append("log", "x")
    b.append("log", b"y")
    assert c.get("log") == b"xy"
    assert a.compare_set("lock", "", "a") == b"a" and b.compare_set("lock", "", "b") == b"a"
    assert c.check(["text", "lock"]) and not c.check(["text", "no"])
    assert c.delete_key("text") and not a.check(["text"]) and not b.delete_key("text")
    a.multi_set(["m1", "m2"], ["1", b"2"])
    assert b.multi_get(["m2", "m1", "bytes"]) == [b"2", b"1", b"\0\1"]
    assert c.multi_get([]) == []


def late(call: Callable[[], object]) -> tuple[str, float]:
    began = time.monotonic()
    with pytest.raises(dist.DistStoreError) as error:
        call()
    return str(error.value), time.monotonic() - began


@pytest.mark.parametrize("number", range(3))
def test_the_time_limit_names_the_key(stores: list[PeerStore], number: int) -> None:
    store = stores[number]
    store.set_timeout(SHORT)
    assert store.timeout == store.clone().timeout == SHORT
    for call in (lambda: store.get("missing"), lambda: store.wait(["missing"]), lambda: store.multi_get(["missing"])):
        text, elapsed = late(call)
        assert "'missing'" in text and "0.3 s" in text and f"rank {number}" in text
        assert 0.3 <= elapsed < 1.0
    store.set_timeout(timedelta(seconds=60))
    text, elapsed = late(lambda: store.wait(["missing"], timedelta(seconds=0.2)))
    assert "0.2 s" in text and elapsed < 1.0


def test_a_store_around_it_shares_its_time_limit(stores: list[PeerStore]) -> None:
    around = dist.PrefixStore("p", stores[0])
    assert around.timeout == timedelta(seconds=LIMIT_S), "the node's own"
    around.set_timeout(SHORT)
    assert stores[0].timeout == SHORT
    text, elapsed = late(lambda: around.get("missing"))
    assert "'p/missing'" in text and 0.3 <= elapsed < 1.0


def test_the_time_limit_names_the_group(stores: list[PeerStore]) -> None:
    """Members 0 and 1 of three have come."""

    def form(rank: int) -> tuple[str, float]:
        stores[rank].set_timeout(SHORT)
        stores[rank].set(f"{GROUP}{rank}", "address")
        return late(lambda: stores[rank].multi_get([f"{GROUP}{number}" for number in range(3)]))

    for rank, (text, elapsed) in enumerate(at_once([lambda: form(0), lambda: form(1)])):
        assert f"rank {rank}" in text and "3 members" in text and GROUP in text and "0.3 s" in text
        assert 0.3 <= elapsed < 1.0


def test_waiting_for_several_keys_waits_for_the_last(stores: list[PeerStore]) -> None:
    begun, done = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        stores[2].wait(["a", "b"])
        done.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert begun.wait(5)
    stores[0].set("a", "")
    assert not done.wait(0.1)
    stores[1].set("b", "")
    assert done.wait(5)
    thread.join(5)


def test_a_group_is_exchanged_among_its_members_only(nodes: list[PeerNode]) -> None:
    stores = {rank: PeerStore(nodes[rank], prefix="sub/", members=[0, 2]) for rank in (0, 2)}

    def form(rank: int) -> list[bytes]:
        stores[rank].set(f"{GROUP}{rank // 2}", f"of {rank}")
        return stores[rank].multi_get([f"{GROUP}0", f"{GROUP}1"])

    assert at_once([lambda: form(0), lambda: form(2)]) == [[b"of 0", b"of 2"]] * 2
    assert nodes[1].accepted == nodes[1].requests == 0
    assert stores[0].get(f"{GROUP}1") == b"of 2" and stores[0].check([f"{GROUP}1"])


def test_different_prefixes_are_different_keys(nodes: list[PeerNode]) -> None:
    a, b = PeerStore(nodes[0], prefix="a/"), PeerStore(nodes[1], prefix="b/")
    a.set("k", "of a")
    b.set("k", "of b")
    assert PeerStore(nodes[2], prefix="a/").get("k") == a.get("k") == a.clone().get("k") == b"of a"
    assert b.get("k") == b"of b"


@pytest.mark.parametrize(
    ("call", "remedy"),
    [
        (lambda store: store.num_keys(), "store.add"),
        (lambda store: store.list_keys(), "store.append"),
        (lambda store: store.queue_push("q", "v"), "store.append"),
        (lambda store: store.queue_pop("q"), "store.get"),
        (lambda store: store.queue_len("q"), "store.add"),
    ],
)
def test_what_needs_a_central_table_is_refused_with_a_remedy(
    stores: list[PeerStore], call: Callable[[PeerStore], object], remedy: str
) -> None:
    with pytest.raises(NotImplementedError, match=remedy) as refusal:
        call(stores[0])
    assert "central server" in str(refusal.value)
