"""How a loader process comes to be.

Seam: `start(task, listener, owner)` forks it from the rank that asks first, so that it has the loader exactly as the rank has it, with its
generators; forked twice, so that it is no child of the rank and does not end with it. `Owner` says whose end is its own: the agent's, or
without an agent the process that started it.

Failures: a fork that fails is one `OSError` in the rank; whatever is raised in the new process is printed there, and ends it. A fork may
hang before its first line: CPython until 3.11 takes a lock there that a thread of the rank, such as one of torch's that calls Python for
the first time, may have held when it was forked. Such a child is killed after `_FORK_S`, and another is forked.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lightning_gemini.forks import keep, not_in_children
from lightning_gemini.mapped.feeder import Feeder, Task

_FORK_S = 10.0
"""A fork of a process with many gigabytes takes about a second."""
_ATTEMPTS = 3


@dataclass(slots=True)
class Owner:
    """Whose end is the feeder's end, and what its process does first."""

    pid: int
    forked: Callable[[], None] = lambda: None
    """Called in the feeder: gives up what it inherited from the rank."""
    started: Callable[[int], None] = lambda pid: None
    """Called in the rank with the feeder's process id."""


def start(task: Task, listener: socket.socket, owner: Owner) -> int:
    """Fork the feeder; returns its process id. `listener` is closed here."""
    sys.stdout.flush()
    sys.stderr.flush()
    keep(listener)
    pid = next((pid for _ in range(_ATTEMPTS) if (pid := _fork(task, listener, owner))), 0)
    listener.close()
    if not pid:
        raise OSError(errno.EAGAIN, "no loader process could be started: the system has no room for another process")
    owner.started(pid)
    return pid


def _fork(task: Task, listener: socket.socket, owner: Owner) -> int:
    """Process id of the feeder, 0 where it did not come to be."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:  # whatever happens, this copy of the rank must not go on as the rank
            os.close(reader)
            if os.fork() == 0:
                os.write(writer, os.getpid().to_bytes(8, "little"))
                os.close(writer)
                _run(task, listener, owner)
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        told = select.select([file], [], [], _FORK_S)[0]
        if not told:
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if not told:  # it may have forked at the last moment; where it has not, nobody is left to write
            told = select.select([file], [], [], _FORK_S)[0]
        return int.from_bytes(file.read(8), "little") if told else 0


def _run(task: Task, listener: socket.socket, owner: Owner) -> None:
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, lambda *_: None)  # the second thread hears of it, and ends the workers in good order
        os.register_at_fork(after_in_child=_as_usual)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the owner's to answer
        not_in_children(listener)
        owner.forked()
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a descriptor or more per batch
        torch.set_num_threads(1)  # the pool of the parent's threads is not here
        Feeder(task, listener, owner.pid).run()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os._exit(status)


def _as_usual() -> None:
    """In the loader's workers: signals end them."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
