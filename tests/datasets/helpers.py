"""Child processes of the tests of data sets, and what they build."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lightning_gemini.datasets.cache import Limits, Recipe, build_or_open
from lightning_gemini.datasets.store import TokenStore

DOCUMENTS = [list(range(n % 7 + 1)) + [256] for n in range(40)]
LIMIT_S = 30.0


def tokens(store: TokenStore) -> list[list[int]]:
    return [store.get(i).tolist() for i in range(len(store))]


def produce() -> Iterator[Any]:
    for document in DOCUMENTS:
        yield np.array(document, "<u2")


def recipe(source: Path, **settings: Any) -> Recipe:
    return Recipe(sources=[source], tokenizer="test", settings=settings, dtype=np.dtype("<u2"))


def build(
    directory: Path, source: Path, made: Callable[[], Iterator[Any]] = produce, wait_s: float = LIMIT_S, **settings: Any
) -> TokenStore:
    return build_or_open(directory, recipe(source, **settings), made, Limits(wait_s=wait_s))


def fork(body: Callable[[], Any]) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(int(LIMIT_S))
            body()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def ended(pid: int, limit_s: float = LIMIT_S) -> int:
    """The exit status of a child, minus the signal that ended it."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"process {pid} did not end in {limit_s:g} s")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(number: int, directory: Path) -> None:
    """Ends this process for good just before its `number`-th use of a file in `directory`: open, rename, remove."""
    seen = [0]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(directory) in str(args[0]):
            seen[0] += 1
            if seen[0] == number:
                die()

    sys.addaudithook(hook)
