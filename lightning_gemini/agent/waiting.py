"""Launchers that start a process for each rank (torchrun, srun with several tasks): one becomes the node's agent, the others wait for it.

Seam: the agent holds a `Door` while it runs; the others call `wait`, and end with the agent's exit status. They meet at an abstract unix
socket named after the job, the node and the user. Nobody has to accept: the kernel keeps who knocks in the backlog, and tells them when the
agent is gone, however it went (then their status is 1). An agent that does not come within `_APPEAR_S` is an error. One that has ended
early (its script was short, the start of the others slow) waits for them, `_LATE_S` at most.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import time

_APPEAR_S = 600.0
_LATE_S = 30.0
_PAUSE_S = 0.1
_BACKLOG = 1024


def _address(job: str, place: str) -> str:
    name = hashlib.blake2b(f"{job} {place} {os.geteuid()}".encode(), digest_size=12).hexdigest()
    return f"\0lightning-gemini.waiting.{name}"


class Door:
    """Where the others wait. `place` tells nodes apart that share a kernel."""

    def __init__(self, job: str, place: str) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._sock.bind(_address(job, place))
        except OSError:
            self._sock.close()
            raise ValueError(f"job {job!r} has an agent on this node already: give each job a name of its own with --job") from None
        self._sock.listen(_BACKLOG)

    def close(self, status: int, expected: int = 0) -> None:
        """Tell all that wait. `expected`: how many will have come."""
        deadline, served = time.monotonic() + _LATE_S, 0
        with contextlib.suppress(BlockingIOError, TimeoutError):
            while True:
                self._sock.settimeout(max(0.0, deadline - time.monotonic()) if served < expected else 0.0)
                knocking, _ = self._sock.accept()
                served += 1
                with knocking, contextlib.suppress(OSError):
                    knocking.send(bytes([status & 0xFF]))
        self._sock.close()


def wait(job: str, place: str) -> int:
    """The exit status of this node's agent. Raises `ValueError` when there is none."""
    deadline = time.monotonic() + _APPEAR_S
    while True:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            try:
                sock.connect(_address(job, place))
            except OSError:
                if time.monotonic() > deadline:
                    raise ValueError(f"no agent of job {job!r} has appeared on this node within {_APPEAR_S:g} s") from None
            else:
                with contextlib.suppress(ConnectionResetError):
                    return (sock.recv(1) or b"\1")[0]
                return 1
        time.sleep(_PAUSE_S)  # nothing tells when a process starts
