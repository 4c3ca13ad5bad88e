"""What belongs to an old generation is refused and interrupted; who is ahead waits for the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from lightning_gemini.peers import wire
from lightning_gemini.peers.errors import RendezvousError, StaleGeneration
from lightning_gemini.peers.node import PeerNode
from lightning_gemini.rendezvous.store import PeerStore
from tests.support.peers import Peers, assert_works, at_once, until

WORLD = 3


@pytest.fixture
def nodes(peers: Peers) -> list[PeerNode]:
    return peers.world(WORLD)


def key_of(nodes: list[PeerNode], rank: int) -> str:
    """A key that `rank` keeps."""
    return next(key for key in map(str, range(999)) if nodes[0]._now.keys.owner(key) == rank)


class Waiting:
    """A call in a thread, and what became of it."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.error: BaseException | None = None
        self.value: object = None
        self._call = call
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._begun.wait(5)

    def _run(self) -> None:
        self._begun.set()
        try:
            self.value = self._call()
        except Exception as error:
            self.error = error

    def join(self, limit_s: float) -> float:
        """How long it took to end."""
        began = time.monotonic()
        self._thread.join(limit_s)
        assert not self._thread.is_alive(), "still waiting"
        return time.monotonic() - began

    @property
    def waits(self) -> bool:
        self._thread.join(0.1)
        return self._thread.is_alive()


def test_who_is_behind_is_refused_and_told_both_generations(nodes: list[PeerNode]) -> None:
    for node in nodes[1:]:
        node.open(3)
    with pytest.raises(StaleGeneration, match=r"generation 0 is over, 3 has begun"):
        nodes[0].call(0, wire.Put(key_of(nodes, 1), b""))
    with pytest.raises(StaleGeneration, match=r"generation 0 is over, 3 has begun"):
        nodes[0].call(0, wire.Get(key_of(nodes, 2)))
    with pytest.raises(StaleGeneration, match=r"generation 0 is over, 3 has begun"):
        nodes[0].all_gather(0, "group", 0, WORLD, b"")
    assert nodes[1].call(3, wire.Check(key_of(nodes, 1))) is False


def test_ones_own_old_generation_is_refused_too(nodes: list[PeerNode]) -> None:
    store = PeerStore(nodes[0])
    nodes[0].open(2)
    for call in (lambda: store.set("k", ""), lambda: store.get("k"), lambda: nodes[0].all_gather(0, "g", 0, WORLD, b"")):
        with pytest.raises(StaleGeneration, match="generation 0 is over, 2 has begun"):
            call()


def test_going_back_is_no_new_generation(nodes: list[PeerNode]) -> None:
    for node in nodes:
        node.open(2)
        node.open(1)
        node.open(2)
    assert_works(nodes, generation=2)
    assert [node.generation for node in nodes] == [2] * WORLD


def test_a_get_that_waits_through_another_rank_learns_why_it_ends(peers: Peers) -> None:
    """Rank 3 of four reads through rank 2 what rank 0 keeps; rank 0 goes on first."""
    nodes = peers.world(4)
    served = nodes[0].requests
    waiting = Waiting(lambda: nodes[3].call(0, wire.Get(key_of(nodes, 0))))
    until(lambda: nodes[0].requests > served)
    nodes[0].open(1)
    assert waiting.join(5) < 1
    assert isinstance(waiting.error, StaleGeneration) and "generation 0 is over, 1 has begun" in str(waiting.error)


@pytest.mark.parametrize("where", range(WORLD))
def test_a_waiting_get_is_interrupted(nodes: list[PeerNode], where: int) -> None:
    """Whether the key would be the rank's own or another's."""
    waiting = Waiting(lambda: nodes[0].call(0, wire.Get(key_of(nodes, where))))
    assert waiting.waits
    nodes[0].open(1)
    assert waiting.join(5) < 1
    assert isinstance(waiting.error, StaleGeneration) and "generation 0 is over, 1 has begun" in str(waiting.error)


def test_a_waiting_all_gather_is_interrupted(nodes: list[PeerNode]) -> None:
    waiting = [Waiting(lambda rank=rank: nodes[rank].all_gather(0, "g", rank, WORLD, b"")) for rank in range(2)]  # type: ignore[misc]
    assert all(one.waits for one in waiting)
    for node in nodes:
        node.open(1)
    for one in waiting:
        assert one.join(5) < 1
        assert isinstance(one.error, StaleGeneration), "also where a peer was the first to know"
    assert_works(nodes, generation=1)


def test_who_dials_a_peer_that_is_not_there_is_interrupted(peers: Peers) -> None:
    roster = peers.world(1)[0].roster
    assert roster.size == 1
    alone = peers.start(type(roster).on_one_node(f"{roster.job}-two", 2), 0)
    waiting = Waiting(lambda: alone.all_gather(0, "g", 0, 2, b""))
    assert waiting.waits
    alone.open(1)
    assert waiting.join(5) < 1 and isinstance(waiting.error, StaleGeneration)


def test_who_is_ahead_waits_for_the_others(nodes: list[PeerNode]) -> None:
    nodes[0].open(1)
    waiting = Waiting(lambda: nodes[0].all_gather(1, "g", 0, WORLD, b"0"))
    writing = Waiting(lambda: nodes[0].call(1, wire.Put(key_of(nodes, 1), b"new")))
    assert waiting.waits and writing.waits
    nodes[1].open(1)
    writing.join(5)
    assert writing.error is None
    assert waiting.waits, "rank 2 has not come yet"
    nodes[2].open(1)
    others = at_once([lambda node=node: node.all_gather(1, "g", node.rank, WORLD, b"%d" % node.rank) for node in nodes[1:]])  # type: ignore[misc]
    waiting.join(5)
    assert waiting.value == others[0] == others[1] == [b"0", b"1", b"2"]
    assert nodes[2].call(1, wire.Get(key_of(nodes, 1)))[1] == b"new"


def test_a_peer_that_stays_behind_is_named_and_not_called_newer(peers: Peers) -> None:
    """The one behind loses its patience first; the one ahead must not be told that its generation is over."""
    nodes = peers.world(2, timeout_s=0.3)
    nodes[0].timeout_s = 1.5
    nodes[0].open(1)
    with pytest.raises(RendezvousError) as error:
        nodes[0].call(1, wire.Put(key_of(nodes, 1), b""), timeout_s=10)
    assert not isinstance(error.value, StaleGeneration), error.value
    assert "rank 1" in str(error.value) and "generation 0" in str(error.value), error.value


def test_keys_end_with_their_generation(nodes: list[PeerNode]) -> None:
    for rank in range(WORLD):
        nodes[0].call(0, wire.Put(key_of(nodes, rank), b"old"))
        assert [node.call(0, wire.Get(key_of(nodes, rank)))[1] for node in nodes] == [b"old"] * WORLD
    for node in nodes:
        node.open(1)
    for rank in range(WORLD):
        assert [node.call(1, wire.Check(key_of(nodes, rank))) for node in nodes] == [False] * WORLD
        with pytest.raises(TimeoutError):
            nodes[0].call(1, wire.Get(key_of(nodes, rank)), timeout_s=0.05)


def test_an_exchange_left_half_done_does_not_reach_the_next_generation(nodes: list[PeerNode]) -> None:
    for node in nodes[:2]:
        with pytest.raises(TimeoutError):
            node.all_gather(0, "g", node.rank, WORLD, b"old", timeout_s=0.2)
    for node in nodes:
        node.open(1)
    assert_works(nodes, "g", generation=1)


def test_many_generations_follow_each_other(nodes: list[PeerNode]) -> None:
    all_have_got_it = threading.Barrier(WORLD, timeout=10)  # the first to go on would break the others' connections

    def live(node: PeerNode) -> None:
        for generation in range(1, 40):
            node.open(generation)
            assert node.all_gather(generation, "g", node.rank, WORLD, b"%d" % generation) == [b"%d" % generation] * WORLD
            all_have_got_it.wait()

    at_once([lambda node=node: live(node) for node in nodes])  # type: ignore[misc]
    assert [node.generation for node in nodes] == [39] * WORLD
