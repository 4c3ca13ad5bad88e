"""One snapshot against one memcpy of the same bytes, in forked processes that all do the same thing at the same time.

Each process owns its bytes in tensors of several sizes, and alternates, round by round, between the baselines (libc's memcpy into
preallocated shared memory; the same followed by one xxh3 pass over the source) and what a rank does at a boundary.
"""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from types import SimpleNamespace
from typing import cast

import torch
import xxhash

from lightning_gemini.agent.memory import Board, create_files
from lightning_gemini.config import PersistentConfig, SnapshotConfig
from lightning_gemini.recovery.memory import Memory
from lightning_gemini.rendezvous.link import Link
from lightning_gemini.state.catalogue import Entry
from lightning_gemini.state.ownership import Layout

Measured = dict[str, list[float]]
_WAIT_S = 120.0
_WARM_UP = 2
_PIECES = 24
_MATRIX = 192
_TRIAL = 20
COMPUTE_FACTOR = 10.0
"""How much longer than a memcpy the computation takes that a background copy overlaps with: a step far shorter than real ones."""


def measure(size: int, ranks: int, rounds: int) -> Measured:
    """Seconds of every round of every process, by what was done; `size` bytes are owned by each of `ranks` processes."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(ranks)
    pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
    workers = [context.Process(target=_work, args=(size, rounds, barrier, sender), daemon=True) for _, sender in pipes]
    for worker in workers:
        worker.start()
    for _, sender in pipes:
        sender.close()
    merged: Measured = defaultdict(list)
    for receiver, _ in pipes:  # EOFError when a worker has failed: its traceback is on stderr
        for name, seconds in cast(Measured, receiver.recv()).items():
            merged[name] += seconds
    for worker in workers:
        worker.join()
    return merged


def _tensors(size: int) -> list[torch.Tensor]:
    """Float tensors of unequal sizes, as those of a model, of `size` bytes together."""
    weights = [1 << (i % 6) for i in range(_PIECES)]
    counts = [size // 4 * weight // sum(weights) for weight in weights]
    counts[0] += size // 4 - sum(counts)
    return [torch.rand(count) for count in counts]


def _memory(tensors: list[torch.Tensor]) -> Memory:
    """A rank's snapshot memory without an agent: this process owns the files itself."""
    entries = [Entry(f"param/{i}", tensor, (0,), "r0", tuple(tensor.shape), (0,)) for i, tensor in enumerate(tensors)]
    files = create_files(1)
    link = SimpleNamespace(rank=0, world=1, files=files, board=Board(files.board, 1), place=lambda rank: rank, voted=lambda: None)
    memory = Memory(
        cast(Link, link), SnapshotConfig(), Layout(0, 1, 1, 1), lambda: entries, list, replicated=False, persistent=PersistentConfig()
    )
    memory.allocate(memory.expected_size(), 0)
    return memory


def _copier(tensors: list[torch.Tensor]) -> Iterator[Callable[[], None]]:
    """memcpy of all tensors into preallocated shared memory, as one pass."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    fd = os.memfd_create("gemini-bench", os.MFD_CLOEXEC)
    os.ftruncate(fd, sum(sizes))
    os.posix_fallocate(fd, 0, sum(sizes))
    mapping = mmap.mmap(fd, sum(sizes))
    target = torch.frombuffer(mapping, dtype=torch.uint8)

    def copy() -> None:
        position = target.data_ptr()
        for tensor, size in zip(tensors, sizes, strict=True):
            ctypes.memmove(position, tensor.data_ptr(), size)
            position += size

    yield copy
    os.close(fd)


class _Bench:
    """The things that are timed, in one process."""

    def __init__(self, size: int, barrier: Barrier) -> None:
        self.barrier = barrier
        self.tensors = _tensors(size)
        self.views = [memoryview(tensor.numpy().data).cast("B") for tensor in self.tensors]
        self.memory = _memory(self.tensors)
        self.copiers = _copier(self.tensors)
        self.copy = next(self.copiers)
        self.left, self.right = torch.rand(_MATRIX, _MATRIX), torch.rand(_MATRIX, _MATRIX)
        self.products = 1
        self.step = 0
        self.found: Measured = defaultdict(list)

    def time(self, name: str, action: Callable[[], None]) -> None:
        """Wall and CPU seconds (of all threads) of `action`, begun by all processes together."""
        self.barrier.wait(_WAIT_S)
        wall, cpu = time.perf_counter(), time.process_time()
        action()
        self.found[f"{name}, CPU"].append(time.process_time() - cpu)
        self.found[name].append(time.perf_counter() - wall)

    def copy_and_hash(self) -> None:
        """The baseline in CPU seconds."""
        self.copy()
        digest = xxhash.xxh3_64()
        for view in self.views:
            digest.update(view)
        digest.intdigest()

    def compute(self) -> None:
        """Something to overlap with."""
        for _ in range(self.products):
            torch.mm(self.left, self.right)

    def calibrate(self) -> None:
        """Choose how much `compute` does, in CPU seconds: the others run too."""
        for _ in range(_WARM_UP):
            self.copy()
            self.compute()
        started = time.process_time()
        self.copy()
        copied, started = time.process_time() - started, time.process_time()
        self.products = _TRIAL
        self.compute()
        self.products = max(1, int(_TRIAL * COMPUTE_FACTOR * copied / (time.process_time() - started)))

    def snapshot(self) -> None:
        """The copy inside the step (`snapshot.background: false`, and FSDP2)."""
        self.step += 1
        self.memory.commit_tensors(self.step)

    def background(self) -> None:
        """The copy in the background, to its end."""
        self.step += 1
        self.memory.drain(self.step, 0)
        self.settle()

    def overlapped(self) -> None:
        """The copy in the background of a computation; what the training thread waits for in our calls is kept by itself."""
        self.step += 1
        started = time.perf_counter()
        self.memory.drain(self.step, 0)
        handed, started = time.perf_counter() - started, time.perf_counter()
        self.compute()
        started = time.perf_counter()
        self.settle()
        self.found["drain() returns"].append(handed)
        self.found["drain() + settle() around computing"].append(handed + time.perf_counter() - started)

    def settle(self) -> None:
        """Wait for the background copy."""
        if not self.memory.settle():
            raise RuntimeError("the copy was torn, though nobody has written")

    def round(self) -> None:
        """Each once."""
        self.time("memcpy", self.copy)
        self.time("memcpy + xxh3", self.copy_and_hash)
        self.time("snapshot in the step", self.snapshot)
        self.time("snapshot in the background", self.background)
        self.time("computing", self.compute)
        self.time("computing + snapshot", self.overlapped)


def _work(size: int, rounds: int, barrier: Barrier, sender: Connection) -> None:
    torch.set_num_threads(1)
    bench = _Bench(size, barrier)
    bench.calibrate()
    for _ in range(_WARM_UP):
        bench.round()
    bench.found.clear()
    for _ in range(rounds):
        bench.round()
    bench.memory.close()
    sender.send(dict(bench.found))
