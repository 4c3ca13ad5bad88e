"""Peers that end: who has had everything may go, who dies is noticed."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from lightning_gemini.peers import wire
from lightning_gemini.peers.errors import PeerLost
from lightning_gemini.peers.node import PeerNode
from lightning_gemini.peers.peer import Exchange
from tests.support.peers import Peers, assert_works, until


def post(node: PeerNode, to: int, box: str, *blocks: bytes) -> None:
    """One message of an all-gather, without the rest."""
    done = threading.Event()

    def send() -> None:
        node._now._peer(to).post(wire.Post(box, list(blocks)), Exchange())
        done.set()

    node._loop.call_soon_threadsafe(send)
    assert done.wait(5)


def test_who_waits_for_the_key_of_a_rank_that_ends_is_told(peers: Peers) -> None:
    nodes = peers.world(2)
    key = next(key for key in map(str, range(99)) if nodes[0]._now.keys.owner(key) == 1)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(nodes[0].call, 0, wire.Get(key), 10)
        until(lambda: nodes[1].requests == 1)
        nodes[1].close()
        with pytest.raises(PeerLost, match="rank 1 was lost"):
            waiting.result(5)


def test_closing_twice_is_closing_once(peers: Peers) -> None:
    nodes = peers.world(2)
    assert_works(nodes)
    for _ in range(2):
        nodes[0].close()
    again = peers.start(nodes[0].roster, 0, generation=1)  # the address is free
    nodes[1].open(1)
    assert_works([again, nodes[1]], generation=1)


def test_who_has_had_everything_may_go(peers: Peers) -> None:
    """Rank 0 has all blocks and leaves; rank 2 is still waiting for the last message of a slow rank 1."""
    nodes = peers.world(3, timeout_s=5)
    with ThreadPoolExecutor(2) as pool:
        first, last = (pool.submit(nodes[rank].all_gather, 0, "g", rank, 3, b"%d" % rank) for rank in (0, 2))
        post(nodes[1], 0, "g#0>0", b"1")
        assert first.result(5) == [b"0", b"1", b"2"]
        nodes[0].close()
        post(nodes[1], 2, "g#1>2", b"1")
        assert last.result(5) == [b"0", b"1", b"2"]


def test_a_child_that_outlives_a_rank_holds_neither_its_address_nor_its_connections(peers: Peers) -> None:
    """As a loader's worker does for some seconds."""
    nodes = peers.world(2)
    assert_works(nodes)
    key = next(key for key in map(str, range(99)) if nodes[0]._now.keys.owner(key) == 1)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.read(reader, 1)  # until the parent is done, or dead
        os._exit(0)
    try:
        os.close(reader)
        with ThreadPoolExecutor(1) as pool:
            served = nodes[1].requests
            waiting = pool.submit(nodes[0].call, 0, wire.Get(key), 10)
            until(lambda: nodes[1].requests > served)
            nodes[1].close()
            with pytest.raises(PeerLost):
                waiting.result(5)
        again = peers.start(nodes[1].roster, 1, generation=1)
        nodes[0].open(1)
        assert_works([nodes[0], again], generation=1)
    finally:
        os.close(writer)
        os.waitpid(child, 0)
