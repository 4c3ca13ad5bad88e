"""Once a write has been acknowledged, no rank reads what was there before: copies are forgotten first, whoever wrote at the same time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from lightning_gemini.peers import wire
from lightning_gemini.peers.errors import PeerLost
from lightning_gemini.peers.keys import Keys
from lightning_gemini.peers.node import PeerNode
from tests.support.peers import Peers, at_once

WORLD = 9


@pytest.fixture
def nodes(peers: Peers) -> list[PeerNode]:
    return peers.world(WORLD)


def read_all(nodes: list[PeerNode], key: str) -> list[bytes]:
    return at_once([lambda node=node: node.call(0, wire.Get(key))[1] for node in nodes])  # type: ignore[misc]


def test_an_overwrite_is_seen_by_all(nodes: list[PeerNode]) -> None:
    chance = random.Random(7)
    for number in range(150):
        key, value = f"k{chance.randrange(4)}", b"%d" % number
        chance.choice(nodes).call(0, wire.Put(key, value))
        assert read_all(nodes, key) == [value] * WORLD


def test_an_overwrite_is_seen_by_those_who_read_all_the_time(nodes: list[PeerNode]) -> None:
    """Every rank counts and reads, all at once: what it reads must contain at least its own count."""

    def work(node: PeerNode) -> list[tuple[int, int]]:
        chance, seen = random.Random(node.rank), []
        for _ in range(40):
            total = node.call(0, wire.Add("n", 1))
            seen.append((total, int(chance.choice(nodes).call(0, wire.Get("n"))[1])))
        return seen

    calls: list[Callable[[], list[tuple[int, int]]]] = [lambda node=node: work(node) for node in nodes]  # type: ignore[misc]
    for seen in at_once(calls):
        assert all(read >= total for total, read in seen), [pair for pair in seen if pair[1] < pair[0]]


class Slow:
    """Three ranks whose orders to forget a copy wait on the way until they are let through."""

    def __init__(self) -> None:
        self.let_through, self.on_the_way = asyncio.Event(), asyncio.Event()
        self.keys = [Keys(rank, 3, self.asker(rank)) for rank in range(3)]
        self.key = next(key for key in map(str, range(99)) if self.keys[0].owner(key) == 0)

    def asker(self, rank: int) -> Callable[[int, wire.Question], Any]:
        async def ask(to: int, message: wire.Question) -> Any:
            if isinstance(message, wire.Forget):
                self.on_the_way.set()
                await self.let_through.wait()
            return await self.keys[to].serve(message, rank)

        return ask

    async def put(self, value: bytes) -> None:
        await self.keys[0].serve(wire.Put(self.key, value), 0)

    async def get(self, rank: int) -> bytes:
        value: bytes = (await self.keys[rank].serve(wire.Get(self.key), rank))[1]
        return value


def test_a_write_waits_for_the_copies_that_an_earlier_write_has_not_yet_ended() -> None:
    async def run() -> None:
        slow = Slow()
        await slow.put(b"1")
        assert await slow.get(1) == b"1"
        second = asyncio.create_task(slow.put(b"2"))
        await asyncio.wait_for(slow.on_the_way.wait(), 5)
        third = asyncio.create_task(slow.put(b"3"))
        await asyncio.wait({third}, timeout=0.05)
        assert not third.done(), "a write was acknowledged while a copy older than it was alive"
        slow.let_through.set()
        await asyncio.wait_for(asyncio.gather(second, third), 5)
        assert await slow.get(1) == await slow.get(2) == b"3"

    asyncio.run(run())


def test_a_value_that_was_overwritten_on_its_way_is_not_kept() -> None:
    async def run() -> None:
        slow = Slow()
        slow.let_through.set()
        await slow.put(b"1")
        answers: list[asyncio.Event] = [asyncio.Event(), asyncio.Event()]
        straight = slow.keys[1]._ask

        async def late(to: int, message: wire.Question) -> Any:
            answer = await straight(to, message)
            answers[0].set()
            await answers[1].wait()
            return answer

        slow.keys[1]._ask = late
        reader = asyncio.create_task(slow.get(1))
        await asyncio.wait_for(answers[0].wait(), 5)
        await slow.put(b"2")  # has the copy forgotten that is still on its way
        answers[1].set()
        assert await asyncio.wait_for(reader, 5) == b"2"
        assert await slow.get(1) == b"2"

    asyncio.run(run())


def test_a_reader_that_could_not_be_told_is_told_by_the_next_write() -> None:
    async def run() -> None:
        slow = Slow()
        slow.let_through.set()
        await slow.put(b"1")
        assert await slow.get(1) == b"1"
        straight = slow.keys[0]._ask

        async def broken(to: int, message: wire.Question) -> Any:
            raise PeerLost("the connection broke")

        slow.keys[0]._ask = broken
        with pytest.raises(PeerLost):
            await slow.put(b"2")
        slow.keys[0]._ask = straight
        await slow.put(b"3")
        assert await slow.get(1) == b"3"

    asyncio.run(run())
