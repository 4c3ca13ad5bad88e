"""Batches per second of a mapped loader against the bare one, and the processes in which all figures about data are measured.

Both sides alternate in one process per case; the clock starts after as many batches as fill every buffer, and never sees a worker start.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import signal
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import psutil
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_gemini.config import DataConfig
from lightning_gemini.mapped.forking import Owner
from lightning_gemini.mapped.loader import MappedLoader, Stream

WINDOW = 10
"""Batches made ahead."""
_FORK = multiprocessing.get_context("fork")
_LIMIT_S, _GRACE_S = 60.0, 5.0
SAMPLES = 32
"""Of a batch."""
WARM_UP = WINDOW + 4
"""Batches that fill every buffer: the window, and two of each worker."""
_STEP_S = 2e-3
_WIDTH = 256
_PAGE = 4096


class Child:
    """A forked process that runs `body(its end of a pipe)`; it and its own children have ended when the `with` block is left."""

    def __init__(self, body: Callable[[Connection], None]) -> None:
        self.talk, theirs = _FORK.Pipe()
        self._process = _FORK.Process(target=_run, args=(body, theirs))
        self._process.start()
        theirs.close()
        self.pid = int(self._process.pid or 0)

    def hear(self) -> Any:
        """The next thing it says. Raises what it died of."""
        if not self.talk.poll(_LIMIT_S):
            raise TimeoutError(f"process {self.pid} says nothing")
        found = self.talk.recv()
        if isinstance(found, BaseException):
            raise found
        return found

    def kill(self) -> None:
        """SIGKILL."""
        family = psutil.Process(self.pid).children(recursive=True) if self._process.is_alive() else []
        self._process.kill()
        for child in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(family, _GRACE_S)
        self._process.join()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.kill()
        self._process.join()
        self.talk.close()


def _run(body: Callable[[Connection], None], talk: Connection) -> None:
    signal.alarm(round(3 * _LIMIT_S))
    try:
        body(talk)
    except BaseException:
        talk.send(RuntimeError(traceback.format_exc()))


class Feeders:
    """The loader processes that ranks start: no children of anybody here, so they are told of through a pipe. None is left after `with`."""

    def __init__(self, owner: int) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        self.owner = Owner(owner, started=self._note)
        self._pids: list[int] = []

    def _note(self, pid: int) -> None:
        os.write(self._writer, pid.to_bytes(8, "little"))

    def pids(self) -> list[int]:
        """All that were ever started."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._reader, 8):
                self._pids.append(int.from_bytes(data, "little"))
        return self._pids

    def wait(self) -> None:
        """Until they have ended by themselves, as they do when their ranks have left: a worker killed at work may leave a file behind."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError), open(os.pidfd_open(pid)) as ended:
                select.select([ended], [], [], _GRACE_S)

    def __enter__(self) -> Feeders:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # it leads a group of its own
        self.wait()
        os.close(self._reader)
        os.close(self._writer)


def mapped(loader: Any, name: str, feeders: Feeders, member: int = 0, ranks: int = 1) -> MappedLoader:
    """`loader` as it stands in a Trainer."""
    stream = Stream(name=name, member=member, ranks=ranks, ahead=lambda: 0, epoch_is_over=lambda: False)
    return MappedLoader(loader, DataConfig(prefetch_length=WINDOW), stream, feeders.owner)


@dataclass(frozen=True, slots=True)
class Case:
    """What is read, and by whom."""

    workers: int
    size: int
    """Bytes of a batch."""
    tokens: bool
    """Whether each sample costs what tokenizing a text costs; otherwise as little as it can."""
    products: int
    """Matrix products of the training step; 0: nothing but the next batch is asked for."""


class _Samples(Dataset[torch.Tensor]):
    def __init__(self, case: Case, tokenize: Callable[[str], list[int]], text: str) -> None:
        self.sample = torch.zeros(case.size // SAMPLES, dtype=torch.uint8)
        self.tokenize, self.text = tokenize if case.tokens else None, text

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.tokenize is not None:
            self.tokenize(self.text)
        return self.sample


def products() -> int:
    """How many matrix products take as long as a small training step."""
    torch.set_num_threads(1)
    matrix, fastest = torch.rand(_WIDTH, _WIDTH), 1.0
    for _ in range(50):
        begun = time.perf_counter()
        matrix @ matrix
        fastest = min(fastest, time.perf_counter() - begun)
    return max(1, round(_STEP_S / fastest))


def _rate(batches: Iterator[torch.Tensor], count: int, seconds: float) -> float:
    """Batches per second."""
    matrix = torch.rand(_WIDTH, _WIDTH)

    def step() -> None:
        batch = next(batches)
        if count:
            batch.view(-1)[::_PAGE].sum()  # a step reads its batch
        for _ in range(count):
            matrix @ matrix

    for _ in range(WARM_UP):
        step()
    begun, done = time.perf_counter(), 0
    while (taken := time.perf_counter() - begun) < seconds:
        step()
        done += 1
    return done / taken


def _one(loader: Any, side: str, case: Case, seconds: float) -> float:
    if side == "bare":
        return _rate(iter(loader), case.products, seconds)
    with Feeders(os.getpid()) as feeders:
        loader = mapped(loader, f"bench-{uuid.uuid4().hex}/0", feeders)
        rate = _rate(iter(loader), case.products, seconds)
        loader.close()
        feeders.wait()
    return rate


def measure(case: Case, tokenize: Callable[[str], list[int]], text: str, times: int, seconds: float) -> list[tuple[float, float]]:
    """Rates of the bare and of the mapped loader, `times` times."""

    def body(talk: Connection) -> None:
        torch.set_num_threads(1)
        data, found = _Samples(case, tokenize, text), []
        for turn in range(times):
            rates = {}
            for side in ("bare", "mapped") if turn % 2 == 0 else ("mapped", "bare"):
                loader = DataLoader(data, batch_size=SAMPLES, num_workers=case.workers)
                rates[side] = _one(loader, side, case, seconds)
            found.append((rates["bare"], rates["mapped"]))
        talk.send(found)

    with Child(body) as child:
        result: list[tuple[float, float]] = child.hear()
    return result
