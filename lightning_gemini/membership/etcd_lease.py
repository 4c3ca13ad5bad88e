"""The lease of a node, and the thread that renews it. Whoever has lost its lease may have been replaced and must stop.

Seam: `grant`, `start`, then `expired` and `lost` say when it is over; `end`. A thread of its own, so that nothing else can make it late.

States: new -> granted -> lost or ended. It is lost when etcd says so, or when the last renewal that succeeded was *sent* longer ago than
the lease lives: then etcd may have ended it, whether or not it can be asked. That also holds for a process that was stopped: the clock
went on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from lightning_gemini.membership.etcd_gateway import Gateway, Refused, Unavailable

_PAUSE_S = 0.1
_RENEWALS = 4
"""Per life of the lease. Killing the leader of three etcds makes them silent for 1 to 2.7 s: with a lease of 4 s that costs nothing."""
_SHORTEST_S = 0.02
_ATTEMPTS = 8
"""Per life of the lease, at a member that does not answer."""


class Lease:
    """See the module's docstring."""

    def __init__(self, gateway: Gateway, clock: Callable[[], float]) -> None:
        self.id = self.ttl_s = 0
        self.job = 0
        """Another lease to renew, without much ado: the job's, while this node leads it; 0: none."""
        self._gateway, self._clock = gateway, clock
        self._renewed = 0.0
        self._why = "etcd does not answer"
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def grant(self, ttl_s: int, timeout_s: float) -> None:
        """Get it. Raises `Unavailable` or `Refused`. etcd may give it a longer life: `ttl_s`."""
        self._renewed = self._clock()
        answer = self._gateway.ask("/lease/grant", timeout_s=timeout_s, TTL=ttl_s, ID=0)
        self.id, self.ttl_s = int(answer["ID"]), int(answer["TTL"])

    def start(self, guarded: Callable[[Callable[[], None]], None], *, silent: Callable[[str], None], gone: Callable[[str], None]) -> None:
        """Renew it from now on. One of the two is called from the thread when it is lost: etcd does not answer, or says that it is gone."""
        self._silent, self._gone = silent, gone
        self._thread = threading.Thread(target=guarded, args=(self._keep,), name="etcd-lease", daemon=True)
        self._thread.start()

    def expired(self) -> bool:
        """Whether etcd may have ended it."""
        return self._left_s() <= 0

    def _left_s(self) -> float:
        return self._renewed + self.ttl_s - self._clock()

    def _keep(self) -> None:
        pause_s = 0.0
        while not self._ended.wait(pause_s):
            if self.expired():
                return self._silent(self.why_expired())
            sent = self._clock()
            try:
                alive = self._renew(self.id)
            except (Unavailable, Refused) as error:
                self._why, pause_s = str(error), min(_PAUSE_S, self._left_s())
                continue
            if not alive:
                return self._gone(f"its lease has ended in etcd: it was silent for {self.ttl_s} s, or was removed")
            self._renewed, pause_s = sent, self.ttl_s / _RENEWALS
            self._renew_job()

    def why_expired(self) -> str:
        """For `lost`."""
        return f"its lease could not be renewed for {self.ttl_s} s, so that others may have taken its place ({self._why})"

    def _renew(self, lease: int) -> bool:
        timeout_s = max(_SHORTEST_S, min(self._left_s(), self.ttl_s / _ATTEMPTS))
        answer = self._gateway.ask("/lease/keepalive", timeout_s=timeout_s, ID=lease)
        return int(answer["result"].get("TTL", 0)) > 0

    def _renew_job(self) -> None:
        try:
            if self.job:
                self._renew(self.job)
        except (Unavailable, Refused):
            pass  # it lives long enough for many more attempts

    def end(self) -> None:
        """Renew it no more; joins the thread, which waits for no longer than for one answer of each member."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
