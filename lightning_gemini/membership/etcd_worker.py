"""The thread that acts for an agent in etcd: it sees what has changed, tells the agent, carries out its wishes and, as the leader, its
duties.

Seam: other threads `do` something in it; `wish` wants a change. A wish is asked for its change again and again, each time with what is in
etcd then, until it was made or is out of date (None). So nothing here depends on whether an answer of etcd was lost, or who else did what.

States: following -> over (the job has ended, or this node is expelled) -> left. What fails: etcd does not answer -> it is tried again,
while the lease lives; etcd refuses -> the same, with a line in the log; anything else that goes wrong in a thread -> expelled, with the
error.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any

from lightning_gemini.membership.base import Decide
from lightning_gemini.membership.etcd_duties import Terms, duty, loss
from lightning_gemini.membership.etcd_gateway import Gateway, Refused, Unavailable
from lightning_gemini.membership.etcd_keys import Change, clear_if_left, create, node_key, revision_of
from lightning_gemini.membership.etcd_lease import Lease
from lightning_gemini.membership.etcd_teller import Teller
from lightning_gemini.membership.etcd_view import View

Wish = Callable[[View], Change | None]

REQUEST_S = 2.0
"""For one answer; a change has to be on the disks of most members."""
JOB_LEASE_S = 60
"""Keys of a job that nobody leads any more are gone after this."""
_TICK_S, _RETRY_S, _LEAVE_S = 1.0, 0.1, 3.0


class Worker:
    """See the module's docstring."""

    def __init__(self, view: View, node: str, gateway: Gateway, lease: Lease, teller: Teller, terms: Terms, decide: Decide) -> None:
        self._view, self._node, self._gateway, self._lease, self._teller = view, node, gateway, lease, teller
        self._terms, self._decide, self._clock = terms, decide, teller.clock
        self._queue: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wishes: list[Wish] = []
        self._written = 0
        """Revision of our newest change: until the view has it, there is nothing to decide."""
        self._job_lease = 0
        self._pause_s = _TICK_S
        self._leaving = False
        self._thread: threading.Thread | None = None

    def start(self, guarded: Callable[[Callable[[], None]], None]) -> None:
        """The view has been read for the first time."""
        self._thread = threading.Thread(target=guarded, args=(self._work,), name="etcd-worker", daemon=True)
        self._thread.start()

    def do(self, call: Callable[[], None]) -> None:
        """Have it done in this thread, soon."""
        self._queue.put(call)

    def wish(self, wish: Wish) -> None:
        """See the module's docstring."""
        self.do(lambda: self._wishes.append(wish))

    def told(self, news: dict[str, Any] | list[dict[str, Any]]) -> None:
        """What the watch has seen."""
        self.do(lambda: self._view.reset(news) if isinstance(news, dict) else self._view.apply(news))

    def _work(self) -> None:
        while not self._leaving:
            self._attend()
            self._listen(self._pause_s)
        self._leave()

    def _listen(self, at_most_s: float) -> None:
        """Wait for something to do, then do all that waits, so that a burst of changes is looked at once."""
        with contextlib.suppress(queue.Empty):
            self._queue.get(timeout=at_most_s)()
            while True:
                self._queue.get_nowait()()

    def _attend(self) -> None:
        self._pause_s = _TICK_S
        self._teller.look(self._view)
        if self._teller.over or self._view.revision < self._written:
            return
        try:
            self._act()
        except Unavailable:
            self._pause_s = _RETRY_S
        except Refused as error:
            self._teller.news(f"etcd refuses: {error}")

    def _act(self) -> None:
        leads = self._view.value("leader") == self._node
        self._lease.job = self._view_lease() if leads else 0
        if self._view.held("leader") is None:
            self._transact(create(f"{self._view.prefix}leader", self._node, self._lease.id))
            return
        if self._grant_wishes() or not leads:
            return
        teller = self._teller
        change = duty(self._view, self._terms, self._decide, waited_s=teller.waited_s(), spent_s=teller.spent_s(self._view))
        if change is not None:
            self._make(change, "leader")

    def _grant_wishes(self) -> bool:
        """Whether the view is out of date now."""
        for wish in list(self._wishes):
            change = wish(self._view)
            made = change is not None and self._make(change)
            if made or change is None:
                self._wishes.remove(wish)
            if made:
                return True
        return False

    def _make(self, change: Change, *fences: str) -> bool:
        """Carry it out, if this node still is what it was."""
        fenced = Change(
            puts=change.puts,
            unchanged={**change.unchanged, **self._view.at(node_key(self._node), *fences)},
            deletes=change.deletes,
            forget_before=change.forget_before,
        )
        return self._transact(fenced.request(self._view.prefix, self._lease_of_job() if change.puts else 0))

    def _transact(self, request: dict[str, Any]) -> bool:
        """Whether it was carried out."""
        answer = self._gateway.ask("/kv/txn", timeout_s=REQUEST_S, **request)
        if not answer.get("succeeded"):
            return False
        self._written = revision_of(answer)
        return True

    def _view_lease(self) -> int:
        generation = self._view.held("generation")
        return generation.lease if generation else 0

    def _lease_of_job(self) -> int:
        """The one in etcd, or one of our own to begin with."""
        if self._view_lease():
            return self._view_lease()
        if not self._job_lease:
            self._job_lease = int(self._gateway.ask("/lease/grant", timeout_s=REQUEST_S, TTL=JOB_LEASE_S, ID=0)["ID"])
        return self._job_lease

    def lease_gone(self, why: str) -> None:
        """Expelled; what else is gone tells whether etcd was wiped. In this thread, as `do` does it."""
        with contextlib.suppress(Unavailable, Refused):
            self._view.reset(self._gateway.ask("/kv/range", timeout_s=REQUEST_S, **self._view.keys()))
        self._teller.look(self._view)
        self._teller.expel(why)

    def leave(self) -> None:
        """Carry out what was wished, if etcd answers, withdraw the registration and end; joins the thread."""
        self.do(self._set_leaving)
        if self._thread is not None:
            self._thread.join()

    def _set_leaving(self) -> None:
        self._leaving = True

    def _leave(self) -> None:
        self._wishes.append(self._withdrawal)
        deadline = self._clock() + _LEAVE_S
        self._attend()
        while self._wishes and not self._teller.over and self._clock() < deadline:
            self._listen(_RETRY_S)
            self._attend()
        self._lease.end()
        with contextlib.suppress(Unavailable, Refused):
            self._revoke(self._lease.id)
            if self._teller.expelled:  # it may come back, as all the others may: the job stays for as long as its lease
                return
            if self._transact(clear_if_left(self._view.prefix)):
                self._revoke(self._view_lease())
            if self._job_lease != self._view_lease():
                self._revoke(self._job_lease)

    def _withdrawal(self, view: View) -> Change | None:
        """A member that leaves before the end says so: nobody has to find out."""
        formed = view.formed
        if formed is None or self._node not in view.nodes or self._node not in formed.generation.roster:
            return None
        done = formed.generation.roster.index(self._node) in view.finished()
        return None if done else loss(view, self._node, "has left", self._teller.spent_s(view))

    def _revoke(self, lease: int) -> None:
        with contextlib.suppress(Refused):  # it has ended
            if lease:
                self._gateway.ask("/lease/revoke", timeout_s=REQUEST_S, ID=lease)
