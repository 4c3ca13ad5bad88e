"""The seam between an agent and whatever keeps the membership of its job.

Life of an agent: `join` -> member (its node is in a roster) or spare (it is not) -> … -> `on_ending`, then `close`. A member that cannot
renew its registration, or finds itself replaced, is *expelled*: it ends its ranks, and may join again under another node name.

A generation: `on_generation` -> every agent of its roster calls `report` when its ranks stand still -> `on_plan`, the same on all ->
`completed` when all its ranks have made a step -> `on_recovered`. Generation 0 forms the job: it has neither reports nor a plan. A further
fault in any state begins the next generation; what was reported or planned for an older one counts no more. Spares hear of all this too.

A place for which there is no node is vacant, and the job waits. Filling it keeps the number: there was no plan, and who has reported need
not do it again. Of several generations that follow each other quickly, only the newest may be heard of.

All methods return at once and are called in the agent's own thread; callbacks come from `poll`, which the agent calls when `fileno` is
readable. Failures are callbacks too: no method raises after `join`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from lightning_gemini.membership.records import Completed, Ending, Generation, NodeInfo, NodeReport, Outcome
from lightning_gemini.recovery.plan import RecoveryPlan

Decide = Callable[[Generation, Mapping[int, NodeReport]], RecoveryPlan]
"""Pure: from the reports of all nodes of a roster, the plan."""


class Observer(Protocol):
    """The agent, as the membership sees it."""

    def on_generation(self, generation: Generation, nodes: Mapping[str, NodeInfo]) -> None:
        """A generation has begun, or its vacant places were filled; `nodes` has everybody in its roster. Never called for an older one."""

    def on_plan(self, number: int, plan: RecoveryPlan) -> None:
        """The plan of generation `number`; never called for one that is over."""

    def on_recovered(self, outcome: Outcome) -> None:
        """The first step after a recovery is complete on all nodes."""

    def on_ending(self, ending: Ending) -> None:
        """The job is over."""

    def on_expelled(self, why: str) -> None:
        """This node is no member any more and must stop at once."""

    def on_news(self, text: str) -> None:
        """One line for the log, such as what the job waits for."""


class Membership(Protocol):
    """See the module's docstring."""

    def join(self, info: NodeInfo) -> None:
        """Register. Raises `ValueError` for what the user must change, `ConnectionError` when nobody answers."""

    def begin(self, after: int, reason: str, *, step: int, detect_s: float = 0.0) -> None:
        """A rank of this node has failed in `step` of generation `after`: the next one shall begin, with the same roster. Nothing happens
        if a later one has begun already."""

    def report(self, report: NodeReport) -> None:
        """This node stands still."""

    def completed(self, completed: Completed) -> None:
        """All ranks of this node have completed a step after a recovery."""

    def suspect(self, node: str) -> None:
        """This agent has lost its connection to `node`: look whether it is still there."""

    def finished(self) -> None:
        """All ranks of this node have ended well; the job ends when all nodes say so."""

    def end(self, ending: Ending) -> None:
        """End the job on all nodes; the first one counts."""

    def fileno(self) -> int:
        """Readable when `poll` has something to do."""

    def poll(self) -> None:
        """Make the callbacks that are due."""

    def close(self) -> None:
        """Leave: registrations go, threads are joined."""
