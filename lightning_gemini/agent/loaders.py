"""Loader processes of a node: ranks fork them, the agent ends them.

Seam: `add(pid)` when a rank says that it has forked one, `end()` at the end of the job. Each leads a process group of its own, which
holds its workers too. It watches the agent by itself, so that it also ends where the agent is killed; one that has ended is no error.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time

_GRACE_S = 3.0
_LIMIT_S = 5.0


class Loaders:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._pidfds: dict[int, int] = {}

    def add(self, pid: int) -> None:
        """One has been forked."""
        self._sweep()
        with contextlib.suppress(ProcessLookupError):
            self._pidfds[pid] = os.pidfd_open(pid)

    def descriptors(self) -> list[int]:
        """What a child of the agent must not keep."""
        return list(self._pidfds.values())

    def _sweep(self) -> None:
        for pid in [pid for pid, pidfd in self._pidfds.items() if _has_ended(pidfd, 0)]:
            _reap(pid)
            os.close(self._pidfds.pop(pid))

    def end(self) -> None:
        """Ask all to end their workers and themselves, kill those that do not, and wait until they are gone."""
        self._sweep()
        for pidfd in self._pidfds.values():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_S
        for pid, pidfd in self._pidfds.items():
            if not _has_ended(pidfd, max(0.0, deadline - time.monotonic())):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)  # its number cannot have been given to another process yet
                _has_ended(pidfd, _LIMIT_S)
            _reap(pid)
            os.close(pidfd)
        self._pidfds.clear()


def _has_ended(pidfd: int, timeout_s: float) -> bool:
    return bool(select.select([pidfd], [], [], timeout_s)[0])


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):  # only where the agent is the first process of a container
        os.waitpid(pid, os.WNOHANG)
