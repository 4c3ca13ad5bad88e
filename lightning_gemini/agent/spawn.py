"""How the agent starts a rank or a spare: by exec of the user's command, or by fork of the calling process.

Seam: `Spawner.spawn(environment, descriptors) -> Child`. `ExecSpawner` is what users get. `ForkSpawner` runs a Python function in a
fork of the agent's process: in tests the parent has torch imported, so that a rank starts in milliseconds. A child that cannot be
started raises `OSError` in the agent, which ends the job with that error.

If the agent is killed the kernel sends SIGCONT to its children (not SIGKILL: a running rank shall say why it ends, and a stopped one
must wake up to see that its agent is gone).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import stat
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class Child:
    """A started process: `pid`, and `pidfd`, readable when it has ended."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.exit_code: int | None = None

    def reap(self) -> int:
        """Exit code of an ended child (negative: signal)."""
        if self.exit_code is None:
            _, status = os.waitpid(self.pid, 0)
            self.exit_code = os.waitstatus_to_exitcode(status)
            os.close(self.pidfd)
        return self.exit_code

    def kill(self) -> None:
        """SIGKILL, without the race of a recycled pid."""
        if self.exit_code is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def is_stopped(self) -> bool:
        """Whether the process is stopped by a signal (state T of the kernel)."""
        try:
            with open(f"/proc/{self.pid}/stat", "rb") as file:
                return file.read().rpartition(b")")[2].split()[0] == b"T"
        except OSError:
            return False


class Spawner(Protocol):
    """Starts processes that inherit `descriptors` and see `environment` on top of the agent's own."""

    def spawn(self, environment: Mapping[str, str], descriptors: Sequence[int], drop: Sequence[int]) -> Child:
        """Start one process that keeps `descriptors` and none of `drop` (the agent's own: a child that held them would hide its death)."""
        ...


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)


class ExecSpawner:
    """Runs a command line, such as `python train.py …`."""

    def __init__(self, command: Sequence[str], cwd: str | None = None) -> None:
        self.command, self.cwd = list(command), cwd

    def spawn(self, environment: Mapping[str, str], descriptors: Sequence[int], drop: Sequence[int]) -> Child:
        """Start the command; exec drops what is not in `descriptors`."""
        process = subprocess.Popen(
            self.command, env={**os.environ, **environment}, cwd=self.cwd, pass_fds=tuple(descriptors), preexec_fn=_die_with_parent
        )
        process.returncode = 0  # the agent reaps through the pidfd; keeps subprocess from polling the pid as well
        return Child(process.pid)


def _leave_sockets(kept: Sequence[int]) -> None:
    """In a forked child, what exec would do: a socket that it held would not be closed for the other end when the agent closes it. The
    numbers stay taken, because objects of the agent that live on here may close them at any time."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode) and int(name) not in kept and not os.get_inheritable(int(name)):
                os.dup2(nothing, int(name), inheritable=False)
    os.close(nothing)


class ForkSpawner:
    """Runs `target()` in a fork of this process; an exception in it is printed and becomes exit code 1."""

    def __init__(self, target: Callable[[], None]) -> None:
        self.target = target

    def spawn(self, environment: Mapping[str, str], descriptors: Sequence[int], drop: Sequence[int]) -> Child:
        """Fork."""
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            return Child(pid)
        code = 1
        try:
            _die_with_parent()
            for fd in drop:
                os.close(fd)
            _leave_sockets(descriptors)
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.environ.update(environment)
            self.target()
            code = 0
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
