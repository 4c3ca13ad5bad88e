"""How a generation follows from another, and what a recovery has taken. Pure; the same for every implementation of the membership."""

from __future__ import annotations

from collections.abc import Collection
from itertools import accumulate

from msgspec.structs import replace

from lightning_gemini.membership.records import Completed, Generation, NodeReport, Outcome
from lightning_gemini.recovery.plan import RecoveryPlan
from lightning_gemini.telemetry.events import PHASES


def after_fault(now: Generation, reason: str, step: int, detect_s: float) -> Generation:
    """The next generation, when a rank has failed: the same roster, one fault more in `step`."""
    faults = now.faults + 1 if step == now.fault_step else 1
    return replace(now, number=now.number + 1, reason=reason, fault_step=step, faults=faults, detect_s=detect_s)


def after_loss(now: Generation, roster: list[str], reason: str, detect_s: float) -> Generation:
    """The next generation, when nodes are gone. In which step they failed nobody knows, so the count of faults stays."""
    return replace(now, number=now.number + 1, roster=roster, reason=reason, detect_s=detect_s)


def outcome(now: Generation, plan: RecoveryPlan, reports: Collection[NodeReport], completed: Collection[Completed]) -> Outcome:
    """What a recovery has taken: each phase ends when the slowest node ends it. What all nodes have said is given; seconds in and out."""
    ends = [
        0.0,
        max(report.stopped_s for report in reports),
        max(done.restored_s for done in completed),
        max(done.regrouped_s for done in completed),
        max(done.resumed_s for done in completed),
    ]
    ends = list(accumulate(ends, max))  # one node may begin a phase before another ends the one before
    took = [now.detect_s, *(end - begin for begin, end in zip(ends, ends[1:], strict=False))]
    return Outcome(
        number=now.number,
        reason=now.reason,
        step=plan.target,
        seconds=dict(zip(PHASES, took, strict=True)),
        repeated_steps=plan.repeated_steps,
    )
