"""The membership of a job of several nodes, kept in etcd. No node of the job is needed for it to go on: each can lead, one does.

Seam: `base.Membership`. Nothing here waits except `join` (for etcd to answer) and `close` (for a last request); the rest is done by three
threads: `Lease` renews the registration, `Watch` follows the keys, `Worker` acts. Only the agent's thread makes callbacks, in `poll`.

States: new -> registered (`join`) -> over (`on_ending` or `on_expelled`) -> closed.

What fails: etcd is not there at `join` -> `ConnectionError`; later -> nothing happens for as long as the lease lives, then this node is
expelled, for another may have its place. Wall clocks are not read: times are those that pass on one machine, order is etcd's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from urllib.parse import quote

from lightning_gemini.membership import etcd_duties, generations
from lightning_gemini.membership.base import Decide, Observer
from lightning_gemini.membership.etcd_duties import Terms, follow, loss
from lightning_gemini.membership.etcd_gateway import Access, Gateway
from lightning_gemini.membership.etcd_keys import Change, number_key
from lightning_gemini.membership.etcd_lease import Lease
from lightning_gemini.membership.etcd_registration import register
from lightning_gemini.membership.etcd_teller import Teller
from lightning_gemini.membership.etcd_view import View
from lightning_gemini.membership.etcd_watch import Watch
from lightning_gemini.membership.etcd_worker import Wish, Worker
from lightning_gemini.membership.outbox import Outbox
from lightning_gemini.membership.probe import refuses
from lightning_gemini.membership.records import Completed, Ending, NodeInfo, NodeReport

PREFIX = "/lightning_gemini/"


class EtcdMembership:
    """See the module's docstring.

    Args:
        endpoints: URLs of etcd's members.
        job: name of the job, the same on all its nodes and nobody else's.
        nnodes: nodes of the job, spares not counted.
        ca, cert, key: files, for https.
        lease_ttl_s: a node that is silent for so long is lost; noticed up to half a second later.
        join_timeout_s: for how long the job waits for its first nodes.
        vacancy_timeout_s: for how long it waits for a node in place of a lost one.
        connect_timeout_s: for how long `join` waits for etcd.
        clock: seconds that pass on this machine.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        job: str,
        nnodes: int,
        decide: Decide,
        observer: Observer,
        *,
        ca: str | None = None,
        cert: str | None = None,
        key: str | None = None,
        user: str = "",
        password: str = "",
        lease_ttl_s: int = 4,
        join_timeout_s: float = 600.0,
        vacancy_timeout_s: float = 600.0,
        connect_timeout_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises `ValueError` for what cannot be."""
        self._access = access = Access(endpoints=tuple(endpoints), ca=ca, cert=cert, key=key, user=user, password=password)
        self._terms = Terms(nnodes=nnodes, join_timeout_s=join_timeout_s, vacancy_timeout_s=vacancy_timeout_s, lease_ttl_s=lease_ttl_s)
        self._decide, self._observer, self._clock, self._connect_timeout_s = decide, observer, clock, connect_timeout_s
        self._outbox = Outbox()
        self._view = View(f"{PREFIX}{quote(job, safe='')}/")
        self._gateways = [Gateway(access) for _ in range(3)]
        self._lease = Lease(self._gateways[0], clock)
        self._node = ""
        self._threads: tuple[Teller, Watch, Worker] | None = None

    def join(self, info: NodeInfo) -> None:
        """Register. Raises `ConnectionError` when etcd does not answer, `ValueError` when it refuses or this node does not fit the
        others."""
        lease, terms = self._lease, self._terms
        register(info, self._access, self._gateways[0], lease, self._view, terms.lease_ttl_s, self._connect_timeout_s)
        self._node = info.node
        teller = Teller(info.node, terms, self._observer, self._outbox, self._clock)
        worker = Worker(self._view, info.node, self._gateways[1], lease, teller, terms, self._decide)
        watch = Watch(self._gateways[2], self._view.keys(), idle_s=lease.ttl_s, told=worker.told)
        if lease.ttl_s != terms.lease_ttl_s:
            teller.news(f"etcd makes leases of {lease.ttl_s} s, not of membership.lease_ttl_s={terms.lease_ttl_s}: losses are noticed then")
        self._threads = teller, watch, worker
        worker.start(self._guarded)
        watch.start(self._guarded)
        lease.start(self._guarded, silent=teller.expel, gone=lambda why: worker.do(lambda: worker.lease_gone(why)))

    def _guarded(self, body: Callable[[], None]) -> None:
        """Runs a thread. What nobody has foreseen must not leave a member behind that does nothing."""
        assert self._threads is not None
        try:
            body()
        except Exception as error:
            self._threads[0].expel(f"{type(error).__name__} in its {threading.current_thread().name} thread: {error}")
            raise

    def _wish(self, wish: Wish) -> None:
        if self._threads is not None:
            self._threads[2].wish(wish)

    def begin(self, after: int, reason: str, *, step: int, detect_s: float = 0.0) -> None:
        """The next generation, unless it has begun."""
        assert self._threads is not None
        teller = self._threads[0]

        def change(view: View) -> Change | None:
            formed = view.formed
            if formed is None or formed.generation.number != after:
                return None
            spent_s = teller.spent_s(view) or detect_s
            return follow(view, generations.after_fault(formed.generation, reason, step, spent_s), formed.nodes)

        self._wish(change)

    def report(self, report: NodeReport) -> None:
        """This node stands still."""
        self._put_in(report.number, number_key("reports", report.number, report.index), report)

    def completed(self, completed: Completed) -> None:
        """This node has made a step."""
        self._put_in(completed.number, number_key("completed", completed.number, completed.index), completed)

    def _put_in(self, number: int, key: str, record: object) -> None:
        """Write something that is of no use in a later generation."""

        def change(view: View) -> Change | None:
            now = view.formed
            return Change(puts={key: record}, unchanged={}) if now is not None and now.generation.number == number else None

        self._wish(change)

    def suspect(self, node: str) -> None:
        """Nobody listens at its address any more -> it is lost. It accepts, or does not answer -> its lease will tell."""
        began = self._clock()

        def change(view: View) -> Change | None:
            info = view.nodes.get(node)
            if info is None or not refuses(info.host, info.port):
                return None
            return loss(view, node, "is gone: nobody listens at its port", self._clock() - began)

        self._wish(change)

    def finished(self) -> None:
        """This node's part is done."""

        def change(view: View) -> Change | None:
            now = view.formed
            if now is None or self._node not in now.generation.roster:
                return None
            return Change(puts={f"finished/{now.generation.roster.index(self._node)}": now.generation.number})

        self._wish(change)

    def end(self, ending: Ending) -> None:
        """End the job; the first one counts."""
        self._wish(lambda view: None if view.ending else etcd_duties.ending(view, ending.status, ending.reason))

    def fileno(self) -> int:
        """Readable when `poll` has something to do."""
        return self._outbox.fileno()

    def poll(self) -> None:
        """Make the callbacks that are due. A process that was stopped for too long hears of nothing but its expulsion."""
        if self._threads is not None and not self._threads[0].over and self._lease.expired():
            self._threads[0].expel(self._lease.why_expired())
        self._outbox.deliver()

    def close(self) -> None:
        """Leave; what was asked for before still happens if etcd answers within seconds. Idempotent."""
        self._outbox.close()
        if self._threads is not None:
            _, watch, worker = self._threads
            worker.leave()
            self._lease.end()
            watch.end()
            self._threads = None
        for gateway in self._gateways:
            gateway.close()
