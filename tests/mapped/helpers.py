"""Data sets that tell what was read of them, and feeders whose end is waited for."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import random
import select
import signal
import socket
import struct
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, get_worker_info

from lightning_gemini.config import DataConfig
from lightning_gemini.data.parts import held_by
from lightning_gemini.data.position import PositionedLoader
from lightning_gemini.mapped import wire
from lightning_gemini.mapped.feed import Feed
from lightning_gemini.mapped.feeder import Task
from lightning_gemini.mapped.forking import Owner, start
from lightning_gemini.mapped.loader import MappedLoader, Stream
from tests.support.peers import until

LIMIT_S = 20.0


class Reads:
    """How often each sample was read, by whichever process."""

    def __init__(self, size: int) -> None:
        self._memory = mmap.mmap(-1, 4 * size)
        self._counts = np.frombuffer(self._memory, dtype=np.int32)

    def add(self, index: int) -> None:
        self._counts[index] += 1  # one process reads one sample

    @property
    def total(self) -> int:
        return int(self._counts.sum())

    def of(self, index: int) -> int:
        return int(self._counts[index])

    def most(self) -> int:
        return int(self._counts.max())


class Samples(Dataset[torch.Tensor]):
    """Map-style; `noise` draws from the global generators, `width` is the number of floats of a sample."""

    def __init__(self, size: int = 20, noise: bool = False, width: int = 2) -> None:
        self.size, self.noise, self.width = size, noise, width
        self.reads = Reads(size)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> torch.Tensor:
        self.reads.add(index)
        if self.noise:
            return torch.tensor([index + float(torch.rand(())), random.random() + np.random.rand()])
        return torch.full((self.width,), float(index))


class Lines(IterableDataset[torch.Tensor]):
    """Iterable; shuffled with the global generator where asked for."""

    def __init__(self, size: int = 20, shuffled: bool = False) -> None:
        self.size, self.shuffled = size, shuffled
        self.reads = Reads(size)

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        values = list(range(info.id if info else 0, self.size, info.num_workers if info else 1))
        if self.shuffled:
            values = [values[i] for i in torch.randperm(len(values)).tolist()]
        for value in values:
            self.reads.add(value)
            yield torch.tensor([float(value)])


def seed() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)


def draw() -> None:
    """What training draws for one batch."""
    torch.rand(3)
    random.random()
    np.random.rand()


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b), (found, expected)


def state() -> bytes:
    """Of the global generators."""
    return repr((random.getstate(), np.random.get_state()[1:], torch.get_rng_state().tolist())).encode()  # type: ignore[index]


def epoch(loader: Any, number: int) -> Iterator[Any]:
    """As Lightning: the sampler's epoch is set, then batch by batch."""
    if isinstance(getattr(loader, "sampler", None), DistributedSampler):
        loader.sampler.set_epoch(number)
    for batch in loader:
        draw()
        yield batch


def train(loader: Any, epochs: int = 1) -> list[Any]:
    return [batch for number in range(epochs) for batch in epoch(loader, number)]


def is_gone(pidfd: int, limit_s: float = LIMIT_S) -> bool:
    return bool(select.select([pidfd], [], [], limit_s)[0])


def of_group(leader: int) -> list[psutil.Process]:
    """Processes of its group that still run."""
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == leader and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        except ProcessLookupError:
            pass
    return found


class Feeders:
    """The feeders of a test; all must have ended when it is over, and their workers with them."""

    def __init__(self) -> None:
        self.started: dict[int, int] = {}
        self.killed: list[int] = []
        self.loaders: list[MappedLoader] = []

    def owner(self, pid: int | None = None) -> Owner:
        return Owner(pid or os.getpid(), started=self.add)

    def add(self, pid: int) -> None:
        self.started[pid] = os.pidfd_open(pid)

    @property
    def newest(self) -> int:
        return list(self.started)[-1]

    def feed(self, loader: Any, *, ranks: int = 1, begin: dict[str, Any] | None = None, **options: Any) -> str:
        """Start one that begins with this process's generators; its name."""
        name = uuid.uuid4().hex
        self.start(name, task_of(loader, ranks=ranks, begin=begin, **options))
        return name

    def start(self, name: str, task: Task, owner: int | None = None) -> int:
        return start(task, listener(name), self.owner(owner))

    def mapped(
        self,
        loader: Any,
        *,
        name: str = "",
        member: int = 0,
        ranks: int = 1,
        ahead: Callable[[], int] = lambda: 0,
        over: Callable[[], bool] = lambda: False,
        **options: Any,
    ) -> MappedLoader:
        stream = Stream(name=name or uuid.uuid4().hex, member=member, ranks=ranks, ahead=ahead, epoch_is_over=over)
        self.loaders.append(MappedLoader(loader, DataConfig(**options), stream, self.owner()))
        return self.loaders[-1]

    def kill(self, pid: int | None = None) -> None:
        """As the kernel does when memory is short; its workers notice, within seconds."""
        pid = self.newest if pid is None else pid
        self.killed.append(pid)
        os.kill(pid, signal.SIGKILL)
        assert is_gone(self.started[pid])

    def close(self) -> None:
        while self.loaders:
            self.loaders.pop().close()
        gc.collect()  # records of batches are maps, and a map has a descriptor
        late = [pid for pid, pidfd in self.started.items() if not is_gone(pidfd, 8.0)]
        for pid in late + self.killed:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        for pid, pidfd in self.started.items():
            os.close(pidfd)
            until(lambda pid=pid: not of_group(pid))  # type: ignore[misc]
        assert not late, f"feeders left behind: {late}"


def beginning(loader: Any) -> dict[str, Any]:
    """A position before the first batch, with the generators as they are."""
    positioned = PositionedLoader(loader, scalars=True)
    positioned._generators = held_by(loader)
    return {"count": 0, "at_iter": positioned.capture(), "at_fetch": []}


def task_of(loader: Any, *, ranks: int = 1, begin: dict[str, Any] | None = None, **options: Any) -> Task:
    return Task(loader, begin or beginning(loader), ranks, DataConfig(**options))


def listener(name: str) -> socket.socket:
    sock = wire.new_socket()
    sock.bind(wire.address(name))
    sock.listen(8)
    return sock


def reader(name: str, number: int = 0, member: int = 0) -> Feed:
    """A rank's end, attached."""
    feed = Feed.connect(name, member)
    assert feed is not None
    feed.attach(number)
    return feed


def rest(feed: Feed, most: int = 1 << 30) -> list[Any]:
    """Batches until the end, or `most`."""
    found: list[Any] = []
    while len(found) < most:
        try:
            found.append(feed.next()[0])
        except StopIteration:
            break
    return found


def words(sock: socket.socket) -> bytes:
    """What a raw connection is sent; nothing at its end."""
    sock.settimeout(LIMIT_S)
    try:
        return sock.recv(1 << 16)
    except ConnectionResetError:
        return b""


def peer(sock: socket.socket) -> int:
    """Process id at the other end."""
    pid: int = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    return pid


def of(data: Any, **options: Any) -> DataLoader[Any]:
    options.setdefault("batch_size", 2)
    return DataLoader(data, **options)
