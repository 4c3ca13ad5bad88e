"""A small job below Lightning, for benchmarks and tests: forked ranks that only do collectives, and a parent that decides.

The parent plays the agent's part with a few messages over socket pairs: it gives out ranks, notices deaths, announces generations. Each
rank holds a default group, a group of its own making and a DeviceMesh, all swappable; it repeats a round of collectives on all of them,
checks the sums, and after a failed round waits for the next generation and goes on with the same objects. Spares are forked in advance.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import psutil
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from lightning_gemini.compat.torch import keep_groups_swappable
from lightning_gemini.peers.roster import Roster
from lightning_gemini.rendezvous import group
from lightning_gemini.rendezvous.world import Mode, World

DEADLINE_S = 60.0
_PATIENCE_S = 30.0
_COLLECTIVE_S = 10.0
"""Limit of one collective: an operation that sleeps in gloo ends with it."""


@dataclass(slots=True)
class Told:
    """What a rank says after its first good round of a generation, or a spare when it is ready (`rank` is -1)."""

    rank: int
    generation: int
    at_ns: int
    """Monotonic clock, when the round was complete."""
    pid: int
    descriptors: int
    threads: int
    rss: int
    listeners: int
    """TCP sockets that listen: gloo's own, one a group and generation at most."""
    asleep: int
    """Operations in which gloo lost a wake-up, and that have not timed out yet; each keeps about three threads and four descriptors."""


class _Control:
    """A rank's end: a thread that listens to the parent, as `Link` listens to the agent."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.announced, self.freed, self.rank = sock, -1, -1, -1
        self.on_news: Callable[[], Any] = lambda: None
        self._news = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while data := self.sock.recv(64):
            generation, rank = map(int, data.split())
            self.announced, self.rank = generation, rank
            self.on_news()  # before anybody forms groups of the new generation
            with self._news:
                self.freed = generation
                self._news.notify_all()
        os._exit(0)  # the parent is gone, or wants us to go

    def wait_beyond(self, generation: int) -> None:
        with self._news:
            if not self._news.wait_for(lambda: self.freed > generation and self.freed == self.announced, _PATIENCE_S):
                raise TimeoutError(f"nobody announced a generation after {generation}")

    def tell(self, generation: int, asleep: int = 0) -> None:
        process = psutil.Process()
        listening = sum(c.status == psutil.CONN_LISTEN for c in process.net_connections("tcp"))
        told = Told(self.rank, generation, time.monotonic_ns(), os.getpid(), process.num_fds(), process.num_threads(),
                    process.memory_info().rss, listening, asleep)  # fmt: skip
        self.sock.send(msgspec.json.encode(told))


def _be_a_rank(sock: socket.socket, job: str, size: int) -> None:
    torch.set_num_threads(1)
    control = _Control(sock)
    control.tell(-1)
    control.wait_beyond(-1)
    world = World(control, _COLLECTIVE_S)
    control.on_news = world.free
    world.join(Roster.on_one_node(job, size), control.rank)
    group.register(lambda: world)
    world.mode = Mode.STAND_IN  # nobody need be there while the objects are made
    dist.init_process_group("gemini", store=dist.HashStore(), rank=control.rank, world_size=size)  # type: ignore[attr-defined]
    keep_groups_swappable()
    others = dist.new_group([rank for rank in range(size) if rank != 1])
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("rows", "columns"))
    reported = -1
    while True:
        if world.stale:
            control.wait_beyond(world.generation)
            world.enter(control.freed)
        world.mode, world.error = Mode.STEP, None
        sums = _round(control.rank, others, mesh)
        if world.error is not None:
            control.wait_beyond(world.generation)
        elif sums != _expected(control.rank, size):
            raise AssertionError(f"rank {control.rank} of generation {world.generation} got the sums {sums}")
        elif reported < world.generation:
            reported = world.generation
            control.tell(reported, world.outstanding.asleep)


def _round(rank: int, others: Any, mesh: Any) -> list[float]:
    sums = []
    for held in [None, *([others] if rank != 1 else []), mesh["columns"].get_group()]:
        x = torch.full((256,), 1.0 + rank)
        dist.all_reduce(x, group=held)
        sums.append(float(x[0]))
    return sums


def _expected(rank: int, size: int) -> list[float]:
    whole = size * (size + 1) / 2
    row = 2.0 * (rank // 2 * 2) + 3.0
    return [whole, *([whole - 2] if rank != 1 else []), row]


class Job:
    """`size` ranks (even, 4 or more) and one spare. Use as a context; everything is killed at its end."""

    def __init__(self, size: int) -> None:
        self.size, self.generation = size, 0
        self.name = f"reforming-{os.getpid()}-{time.monotonic_ns()}"
        self.ranks: dict[int, tuple[int, socket.socket]] = {}
        self.spare: tuple[int, socket.socket] | None = None
        self.last: list[Told] = []
        """What the ranks said last, by rank."""

    def __enter__(self) -> Job:
        for rank in range(self.size):
            self._give(rank, self._warm_spare())
        return self

    def __exit__(self, *_: object) -> None:
        for pid, sock in [*self.ranks.values(), *([self.spare] if self.spare else [])]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            sock.close()

    def _fork(self) -> tuple[int, socket.socket]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            for _, sock in [*self.ranks.values(), (0, ours)]:  # a copy of an end would hide the death of its other end
                sock.close()
            try:
                _be_a_rank(theirs, self.name, self.size)
            finally:
                os._exit(1)
        theirs.close()
        return pid, ours

    def _warm_spare(self) -> tuple[int, socket.socket]:
        spare, self.spare = self.spare or self._fork(), None
        self._await(spare[1])
        return spare

    def _give(self, rank: int, spare: tuple[int, socket.socket]) -> None:
        self.ranks[rank] = spare
        spare[1].send(f"{self.generation} {rank}".encode())

    def _await(self, sock: socket.socket) -> Told:
        if not select.select([sock], [], [], DEADLINE_S)[0]:
            raise TimeoutError(f"a rank said nothing for {DEADLINE_S:g} s")
        data = sock.recv(4096)
        if not data:
            raise RuntimeError("a rank died that should not")
        return msgspec.json.decode(data, type=Told)

    def good(self) -> list[Told]:
        """Until every rank has had a good round in the present generation; one of an earlier generation may have come before it."""
        told = [self._await_good(rank) for rank in range(self.size)]
        self.spare = self.spare or self._fork()
        self.last = told
        return told

    def _await_good(self, rank: int) -> Told:
        while True:
            told = self._await(self.ranks[rank][1])
            if told.generation == self.generation:
                return told

    def replace(self, rank: int, *, stopped: bool) -> tuple[int, int]:
        """Kill a rank (or stop it: then it is killed only when the others have been told), and give it to a warm spare.

        Returns when the fault struck and when it was decided to replace it, in ns.
        """
        spare = self._warm_spare()
        pid, sock = self.ranks.pop(rank)
        struck = time.monotonic_ns()
        os.kill(pid, signal.SIGSTOP if stopped else signal.SIGKILL)
        if stopped:
            os.waitpid(pid, os.WUNTRACED)
        else:
            while sock.recv(4096):  # until the end of file, as an agent notices a death
                pass
        decided = time.monotonic_ns()
        self.generation += 1
        for other, (_, channel) in self.ranks.items():
            channel.send(f"{self.generation} {other}".encode())
        if stopped:
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        sock.close()
        self._give(rank, spare)
        return struck, decided
