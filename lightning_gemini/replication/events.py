"""From the exchange's threads to the agent's: events are queued, and delivered when the agent calls `poll`.

States: open -> closed; an event of a closed queue is dropped, and a socket in it is closed.
"""

from __future__ import annotations

import collections
import contextlib
import os
import socket
import threading
from collections.abc import Callable
from typing import Protocol


class Observer(Protocol):
    """The agent, as the exchange sees it; called from `poll`, in the agent's own thread."""

    def on_replicated(self, rank: int, step: int, index: int) -> None:
        """The node at `index` has verified and committed the snapshot of `rank`."""

    def on_failed(self, rank: int, step: int, index: int, why: str) -> None:
        """It could not be replicated there: no memory, or damaged bytes. It is not tried again; the next request is."""

    def on_control(self, index: int, node: str, sock: socket.socket) -> None:
        """A node has dialled and proved itself; the socket (blocking, no deadline) is the agent's from now on."""

    def on_news(self, text: str) -> None:
        """One line for the log."""


class Events:
    """The queue. `fileno` is readable when there is something in it."""

    def __init__(self) -> None:
        self._queue: collections.deque[tuple[Callable[[Observer], None], socket.socket | None]] = collections.deque()
        self._signal = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._closed = False

    def fileno(self) -> int:
        """For a selector."""
        return self._signal

    def put(self, event: Callable[[Observer], None], sock: socket.socket | None = None) -> None:
        """Queue a call; `sock` is closed if it is never made."""
        with self._lock:
            if not self._closed:
                self._queue.append((event, sock))
                os.eventfd_write(self._signal, 1)
            elif sock is not None:
                sock.close()

    def news(self, text: str) -> None:
        """Queue a line for the log."""
        self.put(lambda observer: observer.on_news(text))

    def wake(self) -> None:
        """Make `fileno` readable: a future is done."""
        self.put(lambda observer: None)

    def deliver(self, observer: Observer) -> None:
        """Make the calls that are queued now."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._signal)
        for _ in range(len(self._queue)):
            event, _ = self._queue.popleft()
            event(observer)

    def close(self) -> None:
        """Drop what is queued."""
        with self._lock:
            self._closed = True
            os.close(self._signal)
        for _, sock in self._queue:
            if sock is not None:
                sock.close()
        self._queue.clear()
