"""Nodes whose ranks have written arenas, with a storage process each; and small Lightning jobs that make and load checkpoints."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_gemini.agent.spawn import ForkSpawner
from lightning_gemini.snapshot import arena
from lightning_gemini.snapshot.slots import SlotFile
from lightning_gemini.state.catalogue import catalogue
from lightning_gemini.state.ownership import Layout, owned
from lightning_gemini.storage import messages, writer
from lightning_gemini.storage.messages import Answer, Message, Place
from lightning_gemini.storage.process import ENVIRONMENT, StorageProcess

CHUNK = 4096
LIMIT_S = 60
RUNNING: list[StorageProcess] = []
"""A forked storage process must not hold the channels of others: they would not end."""
A = TypeVar("A", bound=Answer)


def memfd(name: str) -> int:
    return os.memfd_create(f"test-{name}", os.MFD_CLOEXEC)


def serve() -> None:
    """What a forked storage process runs."""
    writer.serve(os.environ[ENVIRONMENT])


class Node:
    """Arenas of some ranks and a storage process."""

    def __init__(self, number: int, ranks: Sequence[int]) -> None:
        self.number, self.ranks = number, list(ranks)
        self.arenas = [memfd(f"arena-{rank}") for rank in ranks]
        self.description = memfd("description")
        self.process: StorageProcess | None = None
        self._id = 0

    def places(self, position: int = 0, count: int = 1) -> list[Place]:
        return [Place(arena=index, rank=rank, position=position, count=count) for index, rank in enumerate(self.ranks)]

    def start(self, target: Callable[[], None] = serve) -> StorageProcess:
        others = [running.channel.fileno() for running in RUNNING]
        self.process = StorageProcess.start(ForkSpawner(target), arenas=self.arenas, description=self.description, drop=others)
        RUNNING.append(self.process)
        return self.process

    def send(self, kind: type[Message], **fields: Any) -> None:
        self._id += 1
        (self.process or self.start()).send(kind(id=self._id, **fields))

    def hear(self, kind: type[A]) -> A:
        """The next answer, which must be of this kind."""
        assert self.process is not None
        self.process.channel.sock.settimeout(LIMIT_S)
        answer = self.process.receive(wait=True)
        self.process.channel.sock.settimeout(None)
        assert isinstance(answer, kind), answer
        assert answer.id == self._id
        return answer

    def ask(self, request: type[Message], answer: type[A], **fields: Any) -> A:
        self.send(request, **fields)
        return self.hear(answer)

    def persist(self, path: str, step: int, position: int = 0, count: int = 1) -> messages.Written:
        self.ask(messages.Persist, messages.Copied, path=path, step=step, node=self.number, places=self.places(position, count))
        return self.hear(messages.Written)

    def contents(self) -> list[bytes]:
        """Head and segments of each arena's newest slot."""
        found = []
        for fd in self.arenas:
            file = SlotFile(fd)
            slot = file.slots()[-1]
            with file.payload(slot.place) as view:
                found.append(bytes(view[: slot.length]))
            file.close()
        return found

    def wipe(self) -> None:
        """As if the node's memory had been lost."""
        for fd in self.arenas:
            os.ftruncate(fd, 0)

    def end(self, *, kill: bool = False) -> None:
        """End the storage process, if there is one."""
        if self.process is not None:
            RUNNING.remove(self.process)
            self.process.kill() if kill else self.process.close()
            self.process = None

    def close(self) -> None:
        self.end()
        for fd in (*self.arenas, self.description):
            os.close(fd)


@contextmanager
def nodes(*ranks: Sequence[int]) -> Iterator[list[Node]]:
    """One node for each list of ranks."""
    made = [Node(number, of) for number, of in enumerate(ranks)]
    try:
        yield made
    finally:
        for node in made:
            node.close()


def capture(
    fd: int, step: int, model: nn.Module, optimizers: list[Optimizer], layout: Layout, *, replicated: bool, local: bytes = b""
) -> None:
    """What a rank does at a boundary."""
    entries = catalogue(model, optimizers, replicated=replicated, rank=layout.rank, world=layout.world)
    mine = owned(entries, layout)
    file = SlotFile(fd)
    need = arena.payload_size(mine, CHUNK, local)
    if file.capacity < need:
        file.allocate(need)
    arena.capture(file, step, mine, chunk=CHUNK, local=local)
    file.close()


def in_processes(body: Callable[[int], Any], size: int, environ: dict[str, str] | None = None) -> list[Any]:
    """What `body` returns in each of `size` forked ranks; the first error of any is raised here."""
    pipes, pids = [], []
    for rank in range(size):
        reader, end = os.pipe()
        pid = os.fork()
        if pid == 0:
            _child(body, rank, end, {**(environ or {}), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)})
        os.close(end)
        pipes.append(reader)
        pids.append(pid)
    results: list[Any] = []
    try:
        for reader in pipes:
            with os.fdopen(reader, "rb") as stream:
                data = stream.read()
            results.append(pickle.loads(data) if data else "ended without an answer")
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    errors = [result for result in results if isinstance(result, str)]
    assert not errors, "\n".join(errors)
    return [result[0] for result in results]


def _child(body: Callable[[int], Any], rank: int, end: int, environ: dict[str, str]) -> None:
    try:
        signal.alarm(LIMIT_S)
        os.environ.update(environ)
        torch.set_num_threads(1)
        answer: Any = (body(rank),)
    except BaseException:
        answer = traceback.format_exc()
    with os.fdopen(end, "wb") as stream:
        stream.write(pickle.dumps(answer))
    sys.stdout.flush()
    sys.stderr.flush()
    signal.pause()  # groups of others may still need this process


def files_of(path: Path) -> list[str]:
    return sorted(str(found.relative_to(path)) for found in path.rglob("*") if found.is_file())
