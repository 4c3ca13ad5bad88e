"""What is inside a swappable group: gloo for CPU tensors, NCCL for CUDA tensors, one interface.

Seam: `form(...)` builds a backend for one generation; `free(address)` gets threads out of collectives that cannot complete; a backend
that is dropped closes itself. Verified here: gloo, with real kills and SIGSTOP. NCCL is written to its documented behaviour
(`ProcessGroupNCCL.abort`, a fresh id per generation through a fresh store prefix) and runs where a GPU is at hand.

Why `free` shuts sockets: gloo's `abort` and `shutdown` return at once and free nobody who is blocked in C++ because a peer was stopped
or died elsewhere in the ring. Shutting the *connected* sockets does, in milliseconds. Each rank gives gloo a loopback address of its own
(127.a.b.c), by which its sockets are told from all others of the process; listening sockets are left alone (shutting one ends peers).
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroupGloo, Store  # type: ignore[attr-defined]

FORM_TIMEOUT_S = 15.0
"""Limit of building a group once all its members have published their addresses."""


def loopback_address(rank: int, salt: int) -> str:
    """An address of 127/8 for this rank: the salt keeps two jobs apart, which is a convenience, not a need."""
    return f"127.{64 + salt % 128}.{salt // 128 % 256}.{rank % 250 + 1}"


def form_gloo(store: Store, rank: int, size: int, address: str, timeout_s: float) -> ProcessGroupGloo:
    """A connected gloo group of one generation."""
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timedelta(seconds=FORM_TIMEOUT_S)
    options._devices = [ProcessGroupGloo.create_device(hostname=address)]
    group = ProcessGroupGloo(store, rank, size, options)
    group._set_default_timeout(timedelta(seconds=timeout_s))
    return group


def form_nccl(store: Store, rank: int, size: int, timeout_s: float) -> Any:  # pragma: no cover - needs a GPU
    """An NCCL group of one generation; its communicators are made at the first collective."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    return dist.ProcessGroupNCCL(store, rank, size, options)


def abort_nccl(group: Any) -> None:  # pragma: no cover - needs a GPU
    """Release kernels that wait for a dead peer."""
    group.abort()


def free(address: str) -> int:
    """Shut this process's connected sockets at `address` (either end); returns how many."""
    prefix = address.rpartition(".")[0] + "."
    count = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.stat(f"/proc/self/fd/{name}").st_mode):
                continue
            copy = os.dup(int(name))
        except OSError:  # closed meanwhile
            continue
        with socket.socket(fileno=copy) as sock, contextlib.suppress(OSError):
            if sock.family != socket.AF_INET or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                continue
            if sock.getsockname()[0] == address or sock.getpeername()[0].startswith(prefix):
                sock.shutdown(socket.SHUT_RDWR)
                count += 1
    return count
