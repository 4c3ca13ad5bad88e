"""Nodes in network namespaces: links that are slow, and links that are cut."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator

import pytest

from lightning_gemini.replication import sending, tcp
from lightning_gemini.replication.fence import Peer
from lightning_gemini.replication.refill import Want
from tests.replication.helpers import CHUNK, LIMIT_S, TOKEN, Agent, Child, Hear, Tell, random_bytes, verified
from tests.support.nodes import Nodes, require_namespaces

SIZE = 16 * CHUNK  # 1 MiB: a second at 8 Mbit/s


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    require_namespaces()
    made = Nodes(3)
    yield made
    made.close()


class Job:
    """One agent on each node; `bodies` are what they do after they have opened generation 0."""

    def __init__(self, nodes: Nodes, children: list[Child]) -> None:
        self.nodes, self.children = nodes, children
        self.job = f"test-{uuid.uuid4().hex}"

    def start(self, *bodies: object) -> None:
        for number, body in enumerate(bodies):
            self.children.append(Child(lambda hear, tell, number=number, body=body: self._live(number, body, hear, tell)))  # type: ignore[misc]
        ports = [child.hear() for child in self.children]
        for child in self.children:
            child.tell(" ".join(ports))

    def _live(self, number: int, body: object, hear: Hear, tell: Tell) -> None:
        self.nodes.enter(number)
        agent = Agent(self.job, f"node-{number}", host=self.nodes.address(number), token=TOKEN)
        tell(agent.exchange.port)
        ports = [int(port) for port in hear().split()]
        peers = {index: Peer(f"node-{index}", self.nodes.address(index), port) for index, port in enumerate(ports)}
        agent.exchange.open(0, peers, number)
        assert callable(body)
        body(agent, hear, tell)


def keeper(agent: Agent, hear: Hear, tell: Tell) -> None:
    """Tells what it keeps, when asked."""
    while True:
        hear()
        tell(agent.exchange.replicas())


def test_a_slow_link_blocks_nobody_and_the_newest_wins(nodes: Nodes, children: list[Child]) -> None:
    """Ten snapshots are made while the first one crawls; the fast node gets each, the slow one the last."""

    def sender(agent: Agent, hear: Hear, tell: Tell) -> None:
        arena = agent.arena(0, 2 * SIZE)
        for step in range(10):
            arena.write(step, random_bytes(SIZE, step))
            begun = time.monotonic()
            agent.exchange.send(0, step, [1, 2] if step else [2])
            assert time.monotonic() - begun < 0.2
            if step == 0:
                agent.until(lambda: agent.exchange._senders[2]._current is not None)
            else:
                agent.until(lambda step=step: (0, step, 1) in agent.seen.replicated)
        tell((0, 9, 2) in agent.seen.replicated)
        lag = agent.exchange.lag()
        tell((list(lag), lag[0, 2].wanted))
        agent.until(lambda: (0, 9, 2) in agent.seen.replicated)
        tell([step for _, step, index in agent.seen.replicated if index == 2])

    nodes.slow(2, "8mbit")
    Job(nodes, children).start(sender, keeper, keeper)
    assert children[0].hear() == "False" and children[0].hear() == "([(0, 2)], 9)"
    assert children[0].hear() in ("[9]", "[0, 9]")  # the first one may have been in the kernel's buffers when its slot was overwritten
    children[2].tell("?")
    assert children[2].hear() in ("{0: [9]}", "{0: [0, 9]}")


def test_a_link_that_is_cut_and_mended(nodes: Nodes, children: list[Child], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "SILENCE_S", 1.0)
    monkeypatch.setattr(sending, "LAST_PAUSE_S", 0.2)

    def sender(agent: Agent, hear: Hear, tell: Tell) -> None:
        arena = agent.arena(0, 2 * SIZE)
        arena.write(1, random_bytes(SIZE, 1))
        agent.exchange.send(0, 1, [1])
        agent.until(lambda: agent.seen.replicated)
        tell("replicated")
        hear()
        arena.write(2, random_bytes(SIZE, 2))
        agent.exchange.send(0, 2, [1])
        agent.until(lambda: agent.seen.news)
        tell("lost")
        agent.until(lambda: (0, 2, 1) in agent.seen.replicated)
        tell("replicated")

    Job(nodes, children).start(sender, keeper)
    assert children[0].hear() == "replicated"
    nodes.cut(1)
    children[0].tell("go on")
    assert children[0].hear() == "lost"
    nodes.mend(1)
    assert children[0].hear() == "replicated"
    children[1].tell("?")
    assert children[1].hear() == "{0: [1, 2]}"


def test_a_fetch_takes_more_from_the_fast_source(nodes: Nodes, children: list[Child]) -> None:
    """One source has a slow line: with two, all is there much sooner than it could have come from the slow one."""

    def source(agent: Agent, hear: Hear, tell: Tell) -> None:
        agent.arena(0).write(1, random_bytes(4 * SIZE, 1))
        tell("ready")
        hear()

    def new(agent: Agent, hear: Hear, tell: Tell) -> None:
        hear()
        begun = time.monotonic()
        agent.exchange.fetch([Want(0, 1, agent.arena(0).fd, (0, 1))]).result(LIMIT_S)
        tell(time.monotonic() - begun)
        agent.arenas[0].file.__init__(agent.arenas[0].fd)  # type: ignore[misc]
        tell(verified(agent.arenas[0].file, 1).endswith(random_bytes(4 * SIZE, 1)))

    nodes.slow(0, "8mbit")
    Job(nodes, children).start(source, source, new)
    assert [child.hear() for child in children[:2]] == ["ready"] * 2
    children[2].tell("go")
    assert float(children[2].hear()) < 2.0  # four seconds over the slow line alone
    assert children[2].hear() == "True"
