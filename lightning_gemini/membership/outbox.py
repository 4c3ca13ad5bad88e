"""Callbacks on their way to the agent: posted by any thread, made in the agent's own, when it polls.

States: open -> last posted -> closed. What is posted after the last or after `close` is dropped, and so is what still waits when a callback
closes the box. A callback that belongs to a generation is dropped if a later one has begun before it was made.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable

ALWAYS = 1 << 62
"""Number of a callback that belongs to no generation."""


class Outbox:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()
        self._newest = -1
        self._over = self._closed = False

    def fileno(self) -> int:
        """Readable when something was posted since `deliver`."""
        return self._bell

    def begin(self, number: int) -> None:
        """Generation `number` has begun: what belongs to an older one is of no use any more."""
        with self._lock:
            self._newest = max(self._newest, number)

    def post(self, call: Callable[[], None], number: int = ALWAYS, *, last: bool = False) -> None:
        """Have it called at the next `deliver`. `last`: and nothing after it."""
        with self._lock:
            if not self._over and not self._closed:
                self._over = last
                self._waiting.append((number, call))
                os.eventfd_write(self._bell, 1)

    def post_instead(self, call: Callable[[], None]) -> None:
        """Have this called in place of everything that waits, and nothing after it."""
        with self._lock:
            if not self._over:
                self._waiting.clear()
        self.post(call, last=True)

    def deliver(self) -> None:
        """Make the callbacks. One of them may close the box."""
        with self._lock:
            if not self._closed:
                self._hear()
        while (call := self._next()) is not None:
            call()

    def _hear(self) -> None:
        with contextlib.suppress(BlockingIOError):  # polled without need
            os.eventfd_read(self._bell)

    def _next(self) -> Callable[[], None] | None:
        with self._lock:
            while self._waiting:
                number, call = self._waiting.popleft()
                if number >= self._newest:
                    return call
        return None

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._waiting.clear()
                os.close(self._bell)
