"""Memory of four ranks that read one source through one loader process, against four loaders.

The sum of PSS of all processes without shared memory, plus every shared memory file once (batches that wait are in no process's PSS: only
a descriptor holds them). What the ranks had before their loaders started is taken off.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.common import MIB
from benchmarks.data_throughput import WINDOW, Child, Feeders, mapped

RANKS, WORKERS = 4, 2
BATCH = 8 * MIB
_SAMPLES = 32
ONE, MAPPED, BARE = "one loader process for all", "a loader process each (share: false)", "a bare loader each"
_SHARED = ("/memfd:", "/dev/shm/")
_SETTLE_S = 0.5


class _Samples(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((BATCH // _SAMPLES,), index % 251, dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class Taken:
    """Memory in MiB, and who has it."""

    own: float
    shared: float
    processes: int

    @property
    def total(self) -> float:
        """Of both kinds."""
        return self.own + self.shared


def taken(roots: list[int]) -> Taken:
    """By these processes and their children."""
    pids = set(roots)
    for root in roots:
        pids |= {child.pid for child in psutil.Process(root).children(recursive=True)}
    own, files = 0.0, dict[tuple[int, int], int]()
    for pid in pids:
        lines = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
        sizes = {words[0]: int(words[1]) / 1024 for words in lines}
        own += sizes["Pss:"] - sizes["Pss_Shmem:"]
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(descriptor).startswith(_SHARED):
                    stat = os.stat(descriptor)
                    files[stat.st_dev, stat.st_ino] = stat.st_blocks * 512
    return Taken(own, sum(files.values()) / MIB, len(pids))


def _rank(side: str, name: str, member: int, feeders: Feeders) -> Callable[[Connection], None]:
    """Reads a few batches, keeps the newest, and waits until it has been looked at."""

    def body(talk: Connection) -> None:
        torch.set_num_threads(1)
        loader: Any = DataLoader(_Samples(), batch_size=_SAMPLES, num_workers=WORKERS)
        if side != BARE:
            own = f"{name}/0" if side == ONE else f"{name}/0.{member}"
            loader = mapped(loader, own, feeders, member, RANKS if side == ONE else 1)
        talk.send("before")
        talk.recv()
        batches: Iterator[torch.Tensor] = iter(loader)
        for _ in range(WINDOW):
            batch = next(batches)
            int(batch[:, ::4096].sum())  # every page
        talk.send("in the middle of the epoch")
        talk.recv()
        if side != BARE:
            loader.close()

    return body


def measure(side: str) -> Taken:
    """What the loaders of all ranks take while each rank has a batch in hand and the loaders are as far ahead as they go."""
    with contextlib.ExitStack() as stack:
        feeders = stack.enter_context(Feeders(os.getpid()))
        name = f"bench-{uuid.uuid4().hex}"
        ranks = [stack.enter_context(Child(_rank(side, name, member, feeders))) for member in range(RANKS)]
        for rank in ranks:
            rank.hear()
        before = taken([rank.pid for rank in ranks])
        for rank in ranks:
            rank.talk.send("read")
        for rank in ranks:
            rank.hear()
        pids, seen = [rank.pid for rank in ranks] + feeders.pids(), before
        while (now := taken(pids)).shared != seen.shared:
            seen = now
            time.sleep(_SETTLE_S)
        for rank in ranks:
            rank.talk.send("end")
        feeders.wait()
    return Taken(now.own - before.own, now.shared - before.shared, now.processes)
