"""SIGTERM and SIGINT as events of the agent's loop. Made and closed in the main thread; earlier handlers come back on `close`."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable

_ENDING = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """`on_end` is called from `take`, which is due when `fileno` is readable."""

    def __init__(self, on_end: Callable[[signal.Signals], None]) -> None:
        self._on_end = on_end
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, lambda *_: None) for number in (*_ENDING, signal.SIGCHLD)}

    def fileno(self) -> int:
        """Readable after a signal."""
        return self._reader.fileno()

    def take(self) -> None:
        """Handle what has come."""
        for number in self._reader.recv(64):
            if number in _ENDING:
                self._on_end(signal.Signals(number))

    def close(self) -> None:
        """Put everything back."""
        signal.set_wakeup_fd(-1)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._reader.close()
        self._writer.close()
