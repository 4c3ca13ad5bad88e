"""Threads of connections: started by many, joined by one.

`start` after `join` starts nothing: whoever would have worked finds its connection shut anyway.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Threads:
    """Those that are still running."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[threading.Thread] = set()

    def start(self, name: str, work: Callable[[], None]) -> None:
        """Run `work` in a thread of its own."""
        thread = threading.Thread(target=work, name=f"lightning-gemini-{name}", daemon=True)
        with self._lock:
            self._running = {known for known in self._running if known.is_alive()}
            thread.start()
            self._running.add(thread)

    def join(self, limit_s: float) -> None:
        """Wait for all, at most `limit_s` together; they have been told to end."""
        deadline = time.monotonic() + limit_s
        with self._lock:
            running = list(self._running)
        for thread in running:
            thread.join(max(0.0, deadline - time.monotonic()))
