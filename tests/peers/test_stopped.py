"""A process that was stopped in one generation and wakes up two generations later can do no harm, and learns what happened."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from lightning_gemini.peers import wire
from lightning_gemini.peers.errors import RendezvousError
from lightning_gemini.peers.node import PeerNode
from lightning_gemini.peers.roster import Roster
from tests.support.forked import Ranks
from tests.support.peers import new_job

WORLD = 4
LATE = 3
ALIVE, ALL = range(LATE), range(WORLD)


class Member:
    """One of the ranks, obeying words that come through a pipe."""

    def __init__(self, job: str, rank: int) -> None:
        self.rank = rank
        self.node = PeerNode(Roster.on_one_node(job, WORLD), rank, timeout_s=20)
        owner = self.node._now.keys.owner
        self.keys = [next(key for key in map(str, range(99)) if owner(key) == alive) for alive in ALIVE]
        """One that each of those keeps who go on."""

    def enter(self, generation: int) -> str:
        self.node.open(generation)
        return "entered"

    def meet(self, generation: int, size: int, name: bytes) -> str:
        return str(self.node.all_gather(generation, name.decode(), self.rank, size, b"%d" % self.rank, range(size)))

    def write(self, generation: int, value: bytes) -> str:
        for key in self.keys:
            self.node.call(generation, wire.Put(key, value))
        return "written"

    def read(self, generation: int) -> str:
        return str({self.node.call(generation, wire.Get(key), 5)[1] for key in self.keys})

    def own(self, generation: int) -> str:
        """The key that this rank keeps: reading another may lead through the rank that is not there."""
        return str(self.node.call(generation, wire.Get(self.keys[self.rank]))[1])

    def served(self) -> str:
        return str(self.node.requests)

    def wait_for_ever(self) -> str:
        """For a key of rank 0 that nobody sets."""
        try:
            return f"went through: {self.node.call(0, wire.Get(self.keys[0]))}"
        except (RendezvousError, TimeoutError) as error:
            return f"{type(error).__name__}: {error}"

    def try_all(self) -> str:
        """What a process does that has slept: it goes on with generation 0."""
        outcomes = []
        for attempt in (lambda: self.write(0, b"of-the-late"), lambda: self.meet(0, WORLD, b"again"), lambda: self.read(0)):
            try:
                outcomes.append(f"went through: {attempt()}")
            except (RendezvousError, TimeoutError) as error:
                outcomes.append(f"{type(error).__name__}: {error}")
        return " | ".join(outcomes)


class Orders:
    """Sends words to ranks."""

    def __init__(self, ranks: Ranks, pipes: list[int]) -> None:
        self.ranks, self._pipes = ranks, pipes

    def ask(self, rank: int, words: str) -> None:
        os.write(self._pipes[rank], f"{words}\n".encode())

    def all(self, members: range, words: str) -> list[str]:
        """What each of them answers."""
        for rank in members:
            self.ask(rank, words)
        return [self.ranks.hear(rank) for rank in members]


@pytest.fixture
def told() -> Iterator[Orders]:
    job = new_job()
    orders = [os.pipe() for _ in range(WORLD)]

    def body(rank: int, tell: Callable[[str], None]) -> None:
        member = Member(job, rank)
        tell("ready")
        for line in os.fdopen(orders[rank][0]):
            name, *arguments = line.split()
            tell(str(getattr(member, name)(*(int(word) if word.isdigit() else word.encode() for word in arguments))))

    ranks = Ranks(body, WORLD)
    assert [ranks.hear(rank) for rank in range(WORLD)] == ["ready"] * WORLD

    yield Orders(ranks, [writer for _, writer in orders])
    for reader, writer in orders:
        os.close(reader)
        os.close(writer)
    ranks.end()


def everyone(members: range) -> list[str]:
    return [str([b"%d" % rank for rank in members])] * len(members)


def test_a_late_riser_harms_nobody_and_learns_what_happened(told: Orders) -> None:
    assert told.all(ALL, f"meet 0 {WORLD} first") == everyone(ALL)
    assert told.all(range(1), "write 0 old") == ["written"]
    assert told.all(ALIVE, "own 0") == ["b'old'"] * LATE
    os.kill(told.ranks.pids[LATE], signal.SIGSTOP)
    os.waitid(os.P_PID, told.ranks.pids[LATE], os.WSTOPPED | os.WNOWAIT)
    told.ask(LATE, "try_all")  # it finds this order when it wakes
    for generation in (1, 2):
        assert told.all(ALIVE, f"enter {generation}") == ["entered"] * LATE
        assert told.all(ALIVE, f"meet {generation} {LATE} first") == everyone(ALIVE)
    assert told.all(range(1), "write 2 new") == ["written"]
    os.kill(told.ranks.pids[LATE], signal.SIGCONT)
    outcomes = told.ranks.hear(LATE).split(" | ")
    assert [outcome.startswith("StaleGeneration: generation 0 is over, 2 has begun") for outcome in outcomes] == [True] * 3, outcomes
    assert told.all(ALIVE, "own 2") == ["b'new'"] * LATE
    assert told.all(ALIVE, f"meet 2 {LATE} again") == everyone(ALIVE)


def test_who_was_stopped_while_waiting_learns_it_too(told: Orders) -> None:
    assert told.all(ALL, f"meet 0 {WORLD} first") == everyone(ALL)
    before, limit = told.all(range(1), "served"), time.monotonic() + 10
    told.ask(LATE, "wait_for_ever")
    while told.all(range(1), "served") == before:
        assert time.monotonic() < limit, "rank 0 has not been asked"
    os.kill(told.ranks.pids[LATE], signal.SIGSTOP)
    os.waitid(os.P_PID, told.ranks.pids[LATE], os.WSTOPPED | os.WNOWAIT)
    assert told.all(ALIVE, "enter 1") == ["entered"] * LATE
    assert told.all(ALIVE, f"meet 1 {LATE} first") == everyone(ALIVE)
    os.kill(told.ranks.pids[LATE], signal.SIGCONT)
    assert told.ranks.hear(LATE) == "StaleGeneration: generation 0 is over, 1 has begun"
