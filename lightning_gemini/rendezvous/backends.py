"""What is inside a swappable group: gloo for CPU tensors, NCCL for CUDA tensors, one interface.

Seam: `form_gloo` and `form_nccl` build a backend for one generation; `Endpoints.free` and `abort_nccl` get threads out of collectives
that cannot complete; a backend that is dropped closes itself. Verified here: gloo, with real kills and SIGSTOP, on IPv4 and IPv6. NCCL is
written to its documented behaviour (`ProcessGroupNCCL.abort`; a fresh id per generation through a store prefix that is never used
again; several roots, `TORCH_NCCL_RANKS_PER_ROOT`, where the version of NCCL has them) and runs where a GPU is at hand.

Why `free` shuts sockets: gloo's `abort` and `shutdown` return at once and free nobody who is blocked in C++ because a peer was stopped
or died elsewhere in the ring. Shutting the *connected* sockets does, in milliseconds. Listening sockets are left alone: shutting one ends
peers. Which sockets are gloo's follows from the ports of its listeners: a member's own, and those that the members tell each other.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroupGloo, Store  # type: ignore[attr-defined]

import lightning_gemini.forks  # noqa: F401  a replaced group must not be destroyed in a forked child

FORM_TIMEOUT_S = 15.0
"""Limit of connecting a group once all its members have published their addresses."""
RANKS_PER_ROOT = 128
"""NCCL: one process that bootstraps for all others is a bottleneck from some hundreds of ranks on."""
Endpoint = tuple[str, int]
_CHECK_S = 0.02
"""How often a thread that forms a group looks whether its generation is over; success is noticed at once."""


class Endpoints:
    """The listeners of this process's gloo groups and of their members."""

    def __init__(self) -> None:
        self._own: set[Endpoint] = set()
        self._theirs: set[Endpoint] = set()
        self._lock = threading.Lock()

    def listen(self, host: str) -> tuple[Any, Endpoint]:
        """A gloo device that listens at `host` (an address in numbers), and where."""
        with self._lock:
            before = {sock.getsockname() for sock in _sockets(listening=True)}
            device = ProcessGroupGloo.create_device(hostname=host)
            new = [sock.getsockname()[:2] for sock in _sockets(listening=True) if sock.getsockname() not in before]
            self._own.update(new)
        if not new:
            raise RuntimeError("gloo opened no listener of its own: its groups could not be interrupted with this version of torch")
        return device, new[-1]

    def expect(self, endpoints: list[Endpoint]) -> None:
        """Members that this process will connect to."""
        with self._lock:
            self._theirs.update(endpoints)

    def free(self) -> int:
        """Shut this process's connections of all groups so far and forget them; returns how many."""
        with self._lock:
            own, theirs = self._own, self._theirs
            self._own, self._theirs = set(), set()
        count = 0
        for sock in _sockets(listening=False):
            with contextlib.suppress(OSError):
                if sock.getsockname()[:2] in own or sock.getpeername()[:2] in theirs:
                    sock.shutdown(socket.SHUT_RDWR)
                    count += 1
        return count


def _sockets(*, listening: bool) -> Iterator[socket.socket]:
    """This process's TCP sockets, each a duplicate that is closed when the next one is asked for."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.stat(f"/proc/self/fd/{name}").st_mode):
                continue
            copy = os.dup(int(name))
        except OSError:  # closed meanwhile
            continue
        with socket.socket(fileno=copy) as sock:
            if sock.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            if bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)) is listening:
                yield sock


def form_gloo(store: Store, rank: int, size: int, device: Any, timeout_s: float) -> ProcessGroupGloo:
    """A connected gloo group of one generation."""
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timedelta(seconds=FORM_TIMEOUT_S)
    options._devices = [device]
    group = ProcessGroupGloo(store, rank, size, options)
    group._set_default_timeout(timedelta(seconds=timeout_s))
    return group


def form_nccl(store: Store, rank: int, size: int, timeout_s: float) -> Any:  # pragma: no cover - needs a GPU
    """An NCCL group of one generation; its communicators are made at the first collective."""
    os.environ.setdefault("TORCH_NCCL_RANKS_PER_ROOT", str(RANKS_PER_ROOT))
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    return dist.ProcessGroupNCCL(store, rank, size, options)


def abort_nccl(group: Any) -> None:  # pragma: no cover - needs a GPU
    """Release kernels that wait for a dead peer."""
    group.abort()


def abandonable(work: Callable[[], Any], over: Callable[[], bool]) -> Any:
    """Run `work`, which nothing can interrupt, in a thread; return without it (None) once `over`. The thread ends by its own timeout."""
    result: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="lightning-gemini-form", daemon=True)
    thread.start()
    while thread.is_alive() and not over():
        thread.join(_CHECK_S)
    if errors:
        raise errors[0]
    return result[0] if result else None
