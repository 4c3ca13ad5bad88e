"""A rank's connection to its agent: one thread that listens, and calls that ask.

Seam: `Link` sends messages and keeps what arrives; `on_recover` and `on_recovered` are called in the listening thread and must only set
flags or shut sockets. The same thread beats the heart: a stopped process is silent.

States: open -> closed (end of file: the agent is gone). Without its agent a rank has no memory that outlives it and no one to replace
its peers, so it says so and ends at once, from the listening thread: the main thread may be blocked in C++ for ever.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable

from lightning_gemini.agent.channel import Channel
from lightning_gemini.agent.memory import END_AT, HEARTBEAT_NS, Board, NodeFiles
from lightning_gemini.agent.messages import (
    Assign,
    Begin,
    FromAgent,
    FromRank,
    Plan,
    Recover,
    Recovered,
    Stop,
    Voted,
    decode_from_agent,
    encode,
)
from lightning_gemini.peers.errors import StaleGeneration

_BEAT_S = 0.2
AGENT_LOST = 70
"""Exit status of a rank whose agent is gone (EX_SOFTWARE)."""


class Link:
    """See the module's docstring. Built from the environment that the agent set."""

    def __init__(self) -> None:
        self.world = int(os.environ["LIGHTNING_GEMINI_WORLD"])
        self.per_node = int(os.environ["LIGHTNING_GEMINI_PER_NODE"])
        """Ranks of each node."""
        rank = os.environ["LIGHTNING_GEMINI_RANK"]
        self.rank: int | None = int(rank) if rank else None
        self.announced = int(os.environ["LIGHTNING_GEMINI_GENERATION"])
        """Newest generation the agent has announced."""
        self.files = NodeFiles.from_text(os.environ["LIGHTNING_GEMINI_FILES"])
        self.board = Board(self.files.board, self.per_node, alone=self.per_node == self.world)
        self.voting = not self.board.alone
        """Whether the agent wants to hear of each change."""
        self.hosts: list[str] = [host for host in os.environ["LIGHTNING_GEMINI_HOSTS"].split(",") if host]
        """Of the nodes, in the order of their ranks; empty when there is one node only."""
        self.plan: Plan | None = None
        self.begin: Begin | None = None
        self.on_recover: Callable[[], None] = lambda: None
        self.on_recovered: Callable[[Recovered], None] = lambda _: None
        self._channel = Channel(socket.socket(fileno=int(os.environ["LIGHTNING_GEMINI_CHANNEL"])))
        self._agent_pid = os.getppid()
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._listen, name="lightning-gemini-link", daemon=True)
        self._thread.start()

    @property
    def agent_pid(self) -> int:
        """Process id of the agent."""
        return self._agent_pid

    def place(self, rank: int) -> int:
        """A rank's number on its node."""
        return rank % self.per_node

    @property
    def end_at(self) -> int:
        """The step after which the agent wants the job to end, 0 for none."""
        assert self.rank is not None
        return self.board.get(self.place(self.rank), END_AT)

    def is_here(self, rank: int) -> bool:
        """Whether a rank is on this node."""
        assert self.rank is not None
        return rank // self.per_node == self.rank // self.per_node

    def forget(self) -> None:
        """In a forked child that must not pass for this rank: close what it inherited."""
        self._channel.close()

    # ---- asking

    def send(self, message: FromRank) -> None:
        """Tell the agent."""
        self._channel.send(encode(message))

    def voted(self) -> None:
        """This rank's words on the board have changed: other nodes, or the storage process, wait for it."""
        if self.voting:
            self.send(Voted())

    def wait(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Wait until something the listening thread learns makes `condition` true. Raises `TimeoutError`."""
        with self._news:
            if not self._news.wait_for(condition, timeout_s):
                raise TimeoutError(f"waited {timeout_s:g} s for {what}")

    def wait_for_generation_after(self, generation: int, timeout_s: float) -> None:
        """Until the agent announces a newer one."""
        self.wait(lambda: self.announced != generation, timeout_s, "the agent to begin a recovery")

    def wait_for_plan(self, generation: int, timeout_s: float) -> Plan:
        """The plan of `generation`. Raises `StaleGeneration` when a newer one begins first."""
        self.wait(lambda: self.announced != generation or self.plan is not None and self.plan.generation == generation,
                  timeout_s, f"the recovery plan of generation {generation}")  # fmt: skip
        if self.announced != generation or self.plan is None:
            raise StaleGeneration(f"generation {generation} is over, {self.announced} has begun")
        return self.plan

    # ---- listening

    def _listen(self) -> None:
        while True:
            if self.rank is not None:
                self.board.set(self.place(self.rank), HEARTBEAT_NS, time.monotonic_ns())
            if not select.select([self._channel], [], [], _BEAT_S)[0]:
                continue
            data = self._channel.receive(wait=True)
            if data is None:
                self._leave(f"its agent (pid {self._agent_pid}) is gone; rank {self.rank} (pid {os.getpid()}) ends, nothing is left behind")
            else:
                self._handle(decode_from_agent(data))

    def _handle(self, message: FromAgent) -> None:
        with self._news:
            match message:
                case Recover():
                    self.announced = max(self.announced, message.generation)
                case Assign():
                    self.announced = max(self.announced, message.generation)
                    self.rank, self.hosts = message.rank, message.hosts
                case Begin():
                    self.begin = message
                case Plan():
                    self.plan, self.hosts = message, message.hosts
                case Stop():
                    os._exit(0)
                case Recovered():
                    pass
            self._news.notify_all()
        if isinstance(message, Recover):
            self.on_recover()
        elif isinstance(message, Recovered):
            self.on_recovered(message)

    def _leave(self, why: str) -> None:
        with contextlib.suppress(OSError):  # whoever read it may have died with the agent
            print(f"lightning_gemini: {why}", file=sys.stderr, flush=True)
        os._exit(AGENT_LOST)
