"""A thread that follows all keys of a job: `told` gets the answer with all of them first, then lists of changes, from the thread.

States: reading -> following -> (broken -> reading)*. A connection that breaks, a member that is cut off from the others (it says so), and
changes that etcd has compacted away lead back to reading everything. One that says nothing for a while is made anew from where it was:
a connection can be dead without a sign, and then it costs no more than that while.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

from lightning_gemini.membership.etcd_gateway import Gateway, Refused, Unavailable
from lightning_gemini.membership.etcd_keys import revision_of

Told = dict[str, Any] | list[dict[str, Any]]
_PAUSE_S = 0.1


class Watch:
    """See the module's docstring."""

    def __init__(self, gateway: Gateway, keys: dict[str, str], *, idle_s: float, told: Callable[[Told], None]) -> None:
        self._gateway, self._keys, self._idle_s, self._told = gateway, keys, idle_s, told
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, guarded: Callable[[Callable[[], None]], None]) -> None:
        """Follow from now on."""
        self._thread = threading.Thread(target=guarded, args=(self._run,), name="etcd-watch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        pause_s = 0.0
        while not self._ended.wait(pause_s):
            pause_s = 0.0
            try:
                self._follow(self._read())
            except (Unavailable, Refused):
                self._gateway.move_on()
                pause_s = _PAUSE_S

    def _read(self) -> int:
        answer = self._gateway.ask("/kv/range", timeout_s=self._idle_s, **self._keys)
        self._told(answer)
        return revision_of(answer)

    def _follow(self, revision: int) -> None:
        while not self._ended.is_set():
            watch = self._gateway.watch(idle_s=self._idle_s, start_revision=revision + 1, **self._keys)
            with contextlib.closing(watch) as messages:
                for message in messages:
                    if message.get("canceled"):
                        return self._canceled(message)
                    if events := message.get("events"):
                        self._told(events)
                        revision = max(int(event["kv"]["mod_revision"]) for event in events)
                    if self._ended.is_set():
                        return

    def _canceled(self, message: dict[str, Any]) -> None:
        """Either the changes since have been compacted, or etcd does not know the token any more."""
        if "compact_revision" not in message:
            self._gateway.authenticate_again()
            raise Unavailable(message.get("cancel_reason", "etcd has ended the watch"))

    def end(self) -> None:
        """Follow no more; joins the thread, which waits for no longer than for one answer."""
        self._ended.set()
        self._gateway.shut()
        if self._thread is not None:
            self._thread.join()
