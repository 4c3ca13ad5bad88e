"""No room for the window that was asked for: it is said once, and fewer batches are kept."""

from __future__ import annotations

import logging
import os
import resource
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_gemini.config import DataConfig
from lightning_gemini.mapped.forking import Owner
from lightning_gemini.mapped.loader import MappedLoader, Stream

FREE = 8


class Poor(Dataset[torch.Tensor]):
    """The process that reads it may open few files more: each batch that is kept takes one."""

    def __init__(self, free: int) -> None:
        self.free: int | None = free

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.free is not None:
            lowest = os.dup(0)
            os.close(lowest)
            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + self.free, hard))
            self.free = None
        return torch.full((2048,), float(index))


def mapped(data: Dataset[Any], started: list[int], prefetch_length: int = 20) -> MappedLoader:
    stream = Stream(f"no-room-{os.getpid()}-{id(data)}", 0, 1, lambda: 0, lambda: False)
    return MappedLoader(
        DataLoader(data, batch_size=2), DataConfig(prefetch_length=prefetch_length), stream, Owner(os.getpid(), started=started.append)
    )


@pytest.fixture
def said(tmp_path: Path) -> Iterator[Path]:
    """The log, the loader process's too."""
    handler = logging.FileHandler(tmp_path / "log")
    logging.getLogger("lightning_gemini").addHandler(handler)
    yield tmp_path / "log"
    logging.getLogger("lightning_gemini").removeHandler(handler)
    handler.close()


def test_fewer_batches_are_kept(said: Path) -> None:
    started: list[int] = []
    loader = mapped(Poor(FREE), started)
    batches, deadline = iter(loader), time.monotonic() + 30
    first = next(batches)
    while "no room for another batch (Too many open files)" not in said.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    watched = os.pidfd_open(started[0])
    found = [float(batch[0, 0]) for batch in (first, *batches)]
    loader.close()
    assert found == [float(2 * i) for i in range(30)] and len(started) == 1
    assert select.select([watched], [], [], 10)[0], "the loader process is still there"
    os.close(watched)


def test_without_any_room_the_user_is_told() -> None:
    started: list[int] = []
    loader = mapped(Poor(0), started)
    with pytest.raises(OSError, match="Too many open files"):
        list(loader)
    loader.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="the kernel limits descriptors under way for ordinary users only: needs root to become one")
def test_descriptors_under_way_are_limited_for_all_processes_of_a_user() -> None:
    """Four loader processes send more of them than the user may have; each goes on when ranks have taken theirs."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))
            os.setgid(65534)
            os.setuid(65534)
            started: list[int] = []
            loaders = [mapped(TensorDataset(torch.arange(800.0)), started, prefetch_length=100) for _ in range(4)]
            rows = zip(*loaders, strict=True)  # side by side: all of them have batches under way
            os.write(writer, f"{sum(float(batch.sum()) for row in rows for (batch,) in row)} {len(started)}\n".encode())
            for loader in loaders:
                loader.close()
        except BaseException as error:
            os.write(writer, repr(error).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as told:
        assert told.read() == f"{4 * sum(range(800)):.1f} 4\n"
    assert os.waitpid(child, 0)[1] == 0
