"""Handles of collectives that cannot fail in the hands of autograd, and that can be let go.

Gloo sometimes (about once in fifty recoveries here) loses the wake-up of an operation that was posted while its sockets were being shut:
the operation's thread then sleeps until its timeout. So nobody waits for gloo itself, but for a future of our own, which the
listening thread completes when an operation has not ended some time after its sockets were shut (`Outstanding.let_go`). The backend
concerned is kept until its operation has timed out (a recovery after that drops it), because destroying it joins the sleeping thread.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

_GRACE_S = 0.25
"""How long an operation may take to notice that its sockets were shut; it takes milliseconds when it does."""


class DoneWork(dist.Work):
    """A collective that is complete."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self._future: torch.futures.Future[Any] = torch.futures.Future()
        self._future.set_result(value)

    def wait(self, timeout: Any = None) -> bool:
        """Returns at once."""
        return True

    def is_completed(self) -> bool:
        """True."""
        return True

    def is_success(self) -> bool:
        """True."""
        return True

    def get_future(self) -> torch.futures.Future[Any]:
        """A completed future of the value."""
        return self._future


class AbsorbingWork(dist.Work):
    """A running collective whose failure is told to `note` and not raised: DDP's reducer would be left unfinished by an exception."""

    def __init__(self, work: dist.Work, backend: Any, note: Callable[[BaseException], None], value: Any, outstanding: Outstanding) -> None:
        super().__init__()
        self.backend = backend
        self._work, self._note, self._value, self._outstanding = work, note, value, outstanding
        self._lock = threading.Lock()
        self._ended = self._let_go = False
        self.awake = False
        """The backend is done with it, well or not."""
        self._future: torch.futures.Future[Any] = torch.futures.Future()
        try:
            future = work.get_future()
        except RuntimeError:  # gloo's point-to-point has none
            self._future.set_result(value)
            return
        outstanding.add(self)
        future.add_done_callback(self._finish)

    def _finish(self, inner: torch.futures.Future[Any]) -> None:
        self.awake = True
        try:
            inner.value()
        except Exception as error:
            self.end(error)
        else:
            self.end(None)

    def end(self, error: BaseException | None) -> bool:
        """Complete, well or not; False if it was complete already."""
        with self._lock:
            if self._ended:
                return False
            self._ended = True
        if error is not None:
            self._note(error)
        self._outstanding.discard(self)
        self._future.set_result(self._value)
        return True

    def let_go(self) -> bool:
        """End it although the backend still sleeps in it; False if it has ended."""
        self._let_go = True
        return self.end(TimeoutError("the operation did not notice that its sockets were shut"))

    def wait(self, timeout: Any = None) -> bool:
        """Wait; a failure is noted."""
        self._future.wait()
        if not self._let_go:  # at once, where there was a future; on CUDA it orders the streams
            try:
                self._work.wait()
            except Exception as error:
                self._note(error)
        return True

    def is_completed(self) -> bool:
        """Whether it has ended, well or not."""
        return self._ended

    def get_future(self) -> torch.futures.Future[Any]:
        """A future that always completes with the value."""
        return self._future


class Outstanding:
    """The operations of a rank that have not ended."""

    def __init__(self) -> None:
        self._works: set[AbsorbingWork] = set()
        self._asleep: list[AbsorbingWork] = []
        self._lock = threading.Lock()

    @property
    def asleep(self) -> int:
        """Operations that were let go and have not timed out since; each keeps its backend's threads and sockets."""
        return sum(not work.awake for work in self._asleep)

    def add(self, work: AbsorbingWork) -> None:
        """It has begun."""
        with self._lock:
            self._works.add(work)

    def discard(self, work: AbsorbingWork) -> None:
        """It has ended."""
        with self._lock:
            self._works.discard(work)

    def let_go(self) -> int:
        """After sockets were shut: wait for all to end, then end those that sleep. Returns how many that were."""
        self._drop_awake()
        deadline = time.monotonic() + _GRACE_S
        while self._works and time.monotonic() < deadline:
            time.sleep(0.001)
        with self._lock:
            asleep = list(self._works)
        for work in asleep:
            # An immortal reference: when the interpreter ends, a list's references are dropped, and the destructor would join the sleeper.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(work.backend))
            self._asleep.append(work)
        return sum(work.let_go() for work in asleep)

    def _drop_awake(self) -> None:
        """Not in gloo's own thread, which a backend's destructor joins."""
        awake = [work for work in self._asleep if work.awake]
        self._asleep = [work for work in self._asleep if not work.awake]
        for work in awake:
            ctypes.pythonapi.Py_DecRef(ctypes.py_object(work.backend))
