"""The membership of a job that has one node: decided by the agent itself, in memory. No server, no thread, no wait.

States: new -> member (`join`) -> ending or closed. There is nobody to lose and nobody to wait for, so nothing here can fail and the node is
never expelled.
"""

from __future__ import annotations

from lightning_gemini.membership import generations
from lightning_gemini.membership.base import Decide, Observer
from lightning_gemini.membership.outbox import Outbox
from lightning_gemini.membership.records import Completed, Ending, Generation, NodeInfo, NodeReport
from lightning_gemini.recovery.plan import RecoveryPlan


class LocalMembership:
    """See `base.Membership`."""

    def __init__(self, decide: Decide, observer: Observer) -> None:
        self._decide, self._observer, self._outbox = decide, observer, Outbox()
        self._info: NodeInfo | None = None
        self._now = Generation(number=-1, roster=[])
        self._report: NodeReport | None = None
        self._plan: RecoveryPlan | None = None
        self._ended = False

    def join(self, info: NodeInfo) -> None:
        """Form the job."""
        self._info = info
        self._enter(Generation(number=0, roster=[info.node]))

    def _enter(self, generation: Generation) -> None:
        assert self._info is not None, "join first"
        self._now, self._report, self._plan = generation, None, None
        nodes = {self._info.node: self._info}
        self._outbox.begin(generation.number)
        self._outbox.post(lambda: self._observer.on_generation(generation, nodes), generation.number)

    def begin(self, after: int, reason: str, *, step: int, detect_s: float = 0.0) -> None:
        """The next generation, unless it has begun."""
        if after == self._now.number and not self._ended:
            self._enter(generations.after_fault(self._now, reason, step, detect_s))

    def report(self, report: NodeReport) -> None:
        """Leads to the plan: this node is all there is."""
        if report.number != self._now.number or self._plan is not None or self._ended:
            return
        self._report, self._plan = report, self._decide(self._now, {report.index: report})
        number, plan = report.number, self._plan
        self._outbox.post(lambda: self._observer.on_plan(number, plan), number)

    def completed(self, completed: Completed) -> None:
        """Leads to the outcome."""
        if completed.number == self._now.number and self._plan is not None and self._report is not None:
            outcome = generations.outcome(self._now, self._plan, [self._report], [completed])
            self._report = None  # a recovery has one outcome
            self._outbox.post(lambda: self._observer.on_recovered(outcome))

    def suspect(self, node: str) -> None:
        """There is no other node."""

    def finished(self) -> None:
        """The job is done."""
        self.end(Ending(status=0, reason="all nodes have finished"))

    def end(self, ending: Ending) -> None:
        """End the job."""
        if not self._ended:
            self._ended = True
            self._outbox.post(lambda: self._observer.on_ending(ending))

    def fileno(self) -> int:
        """Readable when `poll` has something to do."""
        return self._outbox.fileno()

    def poll(self) -> None:
        """Make the callbacks that are due."""
        self._outbox.deliver()

    def close(self) -> None:
        """Idempotent."""
        self._outbox.close()
