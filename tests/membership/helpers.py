"""Agents that do what a membership tells them: within this process, polled together, or each in a forked process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_gemini.membership.base import Membership
from lightning_gemini.membership.etcd import EtcdMembership
from lightning_gemini.membership.records import Completed, Ending, Generation, NodeInfo, NodeReport, Outcome
from lightning_gemini.recovery.plan import RankInventory, RecoveryPlan

LIMIT_S = 20.0
Event = tuple[Any, ...]


def info(node: str, **fields: Any) -> NodeInfo:
    """Of an agent on loopback."""
    return NodeInfo(**{"node": node, "host": "127.0.0.1", "port": 9, "ranks_per_node": 2, **fields})


def decide(generation: Generation, reports: Mapping[int, NodeReport]) -> RecoveryPlan:
    """A plan that shows what it was made of."""
    target = min(inventory.boundary for report in reports.values() for inventory in report.ranks.values())
    return RecoveryPlan(action="in_place", target=target, reason=f"{sorted(reports)} {generation.reason}", donors={1: 0})


def report(number: int, index: int, step: int = 5, **fields: Any) -> NodeReport:
    """Of a node whose two ranks stand in `step`."""
    ranks = {index * 2 + i: RankInventory(alive=True, boundary=step, tensors=frozenset({step})) for i in range(2)}
    return NodeReport(number=number, index=index, ranks=ranks, **{"stopped_s": 0.25, **fields})


class Agent:
    """Has a membership made with itself as its observer. `diligent`: reports and completes by itself."""

    def __init__(self, node: str, make: Callable[[Agent], Membership], *, diligent: bool = True, join: bool = True, **fields: Any) -> None:
        self.node, self.diligent = node, diligent
        self.events: list[Event] = []
        self.generation = Generation(number=-1, roster=[])
        self.nodes: Mapping[str, NodeInfo] = {}
        self.on_event: Callable[[Event], None] = self.events.append
        self.membership = make(self)
        if join:
            try:
                self.membership.join(info(node, **fields))
            except BaseException:
                self.membership.close()
                raise

    def _tell(self, *event: Any) -> None:
        self.on_event(event)

    @property
    def index(self) -> int:
        """In the newest roster, -1 for none."""
        return self.generation.roster.index(self.node) if self.node in self.generation.roster else -1

    def of(self, kind: str) -> list[Event]:
        """Events of one kind."""
        return [event for event in self.events if event[0] == kind]

    def on_generation(self, generation: Generation, nodes: Mapping[str, NodeInfo]) -> None:
        again = generation.number == self.generation.number and self.index >= 0
        self.generation, self.nodes = generation, nodes
        self._tell("generation", generation.number, generation.roster, generation.reason)
        if self.diligent and generation.number and self.index >= 0 and not again:
            self.membership.report(report(generation.number, self.index))

    def on_plan(self, number: int, plan: RecoveryPlan) -> None:
        self._tell("plan", number, plan.target, plan.reason)
        if self.diligent and self.index >= 0:
            self.membership.completed(Completed(number=number, index=self.index, restored_s=0.5, regrouped_s=0.75, resumed_s=1.75))

    def on_recovered(self, outcome: Outcome) -> None:
        self._tell("recovered", outcome.number, outcome.seconds)

    def on_ending(self, ending: Ending) -> None:
        self._tell("ending", ending.status, ending.reason)

    def on_expelled(self, why: str) -> None:
        self._tell("expelled", why)

    def on_news(self, text: str) -> None:
        self._tell("news", text)


def pump(agents: Sequence[Agent], until: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    """Poll agents when there is need, as their loops would, until something is so."""
    deadline = time.monotonic() + limit_s
    while not until():
        left_s = deadline - time.monotonic()
        assert left_s > 0, {agent.node: agent.events[-6:] for agent in agents}
        ready, _, _ = select.select([agent.membership for agent in agents], [], [], min(left_s, 0.2))
        for membership in ready:
            membership.poll()


def at(agents: Sequence[Agent], number: int) -> Callable[[], bool]:
    """Whether all have seen a generation."""
    return lambda: all(agent.generation.number >= number for agent in agents)


def have(agents: Sequence[Agent], kind: str, count: int = 1) -> Callable[[], bool]:
    """Whether all have seen events of a kind."""
    return lambda: all(len(agent.of(kind)) >= count for agent in agents)


class Process:
    """An agent in a forked process, which listens at a port as an agent does. It tells its events and obeys: each word is a method of its
    membership, with arguments."""

    def __init__(
        self, node: str, endpoints: Sequence[str], job: str, nnodes: int, *, prepare: Callable[[], None] | None = None, **options: Any
    ) -> None:
        self.node = node
        self.events: list[Event] = []
        fields = {key: options.pop(key) for key in ("host", "spare", "domain", "preferred", "diligent") if key in options}
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                signal.alarm(100)
                self._control.close()
                if prepare is not None:
                    prepare()
                _live(node, theirs, lambda agent: EtcdMembership(endpoints, job, nnodes, decide, agent, **options), fields)
            except BaseException:
                theirs.send(json.dumps(["failed", traceback.format_exc()[-4000:]]).encode())
            finally:
                os._exit(0)
        theirs.close()

    def tell(self, *words: Any) -> None:
        self._control.send(json.dumps(words).encode())

    def fileno(self) -> int:
        return self._control.fileno()

    def read(self) -> None:
        """Take what it has told; its death is an event too."""
        said = b""
        with contextlib.suppress(ConnectionResetError):
            said = self._control.recv(1 << 16)
        self.events.append((time.monotonic(), *(json.loads(said) if said else ["died"])))
        assert self.events[-1][1] != "failed", self.events[-1][2]

    def of(self, kind: str) -> list[Event]:
        """Events of one kind, each with the time at which it was read in front."""
        return [event for event in self.events if event[1] == kind]

    @property
    def number(self) -> int:
        """Of the newest generation it has told."""
        return max((event[2] for event in self.of("generation")), default=-1)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self) -> None:
        """Kill it."""
        self.signal(signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._control.close()


def _live(node: str, control: socket.socket, make: Callable[[Agent], Membership], fields: dict[str, Any]) -> None:
    with socket.create_server((fields.get("host", "127.0.0.1"), 0)) as listening:
        agent = Agent(node, make, join=False, diligent=fields.pop("diligent", True))
        agent.on_event = lambda event: control.send(json.dumps(event).encode()) and None  # type: ignore[func-returns-value]
        agent.membership.join(info(node, port=listening.getsockname()[1], **fields))
        agent.on_event(("joined",))
        while True:
            ready, _, _ = select.select([agent.membership, control], [], [])
            if agent.membership in ready:
                agent.membership.poll()
            if control in ready and not _obey(agent, json.loads(control.recv(1 << 16) or '["close"]')):
                return


def _obey(agent: Agent, words: list[Any]) -> bool:
    name, *arguments = words
    if name == "begin":
        agent.membership.begin(agent.generation.number, "a fault", step=arguments[0])
    elif name == "end":
        agent.membership.end(Ending(status=arguments[0], reason="wished"))
    else:
        getattr(agent.membership, name)(*arguments)
    return name != "close"


def watch(processes: Sequence[Process], until: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    """Read what processes tell until something is so."""
    deadline = time.monotonic() + limit_s
    while not until():
        left_s = deadline - time.monotonic()
        assert left_s > 0, {process.node: process.events[-6:] for process in processes}
        alive = [process for process in processes if not process.of("died")]
        ready, _, _ = select.select(alive, [], [], left_s)
        for process in ready:
            process.read()


def reached(processes: Sequence[Process], kind: str, number: int) -> Callable[[], bool]:
    """Whether all have told an event of a kind, of that generation or a later one."""
    return lambda: all(any(event[2] >= number for event in process.of(kind)) for process in processes)
