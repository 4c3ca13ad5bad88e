"""The one decision of a recovery, for whichever node leads: from what every node reports to the plan of all. Pure.

Failure: reports that nobody has foreseen must not end the leader, and the next one, and the next; the plan then is to end the job, and why.
"""

from __future__ import annotations

from collections.abc import Mapping

from lightning_gemini.membership.records import Generation, NodeReport
from lightning_gemini.recovery.plan import RecoveryPlan, plan


def decide(generation: Generation, reports: Mapping[int, NodeReport]) -> RecoveryPlan:
    """The plan of `generation`; see `membership.base.Decide`."""
    ranks = {rank: inventory for report in reports.values() for rank, inventory in report.ranks.items()}
    try:
        return plan(
            ranks,
            ranks_per_node=len(ranks) // len(reports),
            replicas={index: report.replicas for index, report in reports.items()},
            lost=max(report.lost_step for report in reports.values()),
            persisted=max((report.persisted, report.persisted_path) for report in reports.values()),
        )
    except Exception as error:
        return RecoveryPlan(action="end", target=-1, reason=f"generation {generation.number} has no plan: {type(error).__name__}: {error}")
