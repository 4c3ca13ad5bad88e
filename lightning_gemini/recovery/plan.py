"""The decision: from what every rank has, what everyone does. Pure, no I/O, no torch; used by the coordinator in the agent.

Seam: `plan(inventory) -> RecoveryPlan`. The ladder, per shard: live replica, own node's memory. The target is the newest step that every
rank's local state *and* every shard can be restored to. Because a rank leaves step s only when all ranks have committed the
boundary s + 1 (see `recovery.step`), survivors are never ahead of the target by more than a write that they take back in place.

Outcomes:
    in place   survivors stay inside their step (or their collective) and repeat it; the replaced land at the target.
    rewind     some shard at the target is nowhere (cadence > 1 and a torn write, or all replicas died while a copy drained): everybody
               re-enters `fit` from the newest snapshot that all have; completed steps after it are repeated, and the plan says how many.
    restart    a rank died before the first boundary: there is nothing to restore and nothing to lose, processes start anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class RankInventory:
    """What one rank has, when everybody stands still."""

    alive: bool
    """It stands in its step or collective and can go on from there; False for a dead or unwinding rank."""
    boundary: int
    """Step of its newest committed boundary (local state), -1 if none."""
    wrote: bool = False
    """Its optimizer has begun to write the step `boundary`: its live tensors are torn (or one ahead)."""
    in_step: bool = False
    local: frozenset[int] = frozenset()
    """Steps whose rank-local state is committed in its ledger."""
    tensors: frozenset[int] = frozenset()
    """Steps whose owned tensors are committed in its arena."""
    counters: Mapping[str, int] = field(default_factory=dict)
    """Collectives completed outside steps, by group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryPlan:
    """See the module's docstring. `donors`: rank without a committed shard -> live rank that writes it on its behalf."""

    action: str
    target: int
    reason: str
    donors: dict[int, int] = field(default_factory=dict)
    logs: dict[str, tuple[int, int]] = field(default_factory=dict)
    repeated_steps: int = 0


def plan(ranks: Mapping[int, RankInventory], *, replicated: bool) -> RecoveryPlan:
    """Decide a recovery.

    Args:
        ranks: inventory of every rank of the world, dead ones included.
        replicated: every live rank holds a copy of all shared tensors (DDP); False when each shard has one holder (FSDP2).
    """
    if not ranks:
        raise ValueError("ranks={} is not valid: give the inventory of every rank of the world")
    target = min(inventory.boundary for inventory in ranks.values())
    if target < 0:
        return RecoveryPlan(action="restart", target=-1, reason="a rank had no boundary yet")
    logs = _furthest(ranks)
    lacking = [rank for rank, inventory in ranks.items() if target not in inventory.local and _goes_back(inventory, target)]
    if lacking:
        return _rewind(ranks, target, f"rank {lacking[0]} has no local state of step {target}")
    sources = [rank for rank, inventory in ranks.items() if inventory.alive and not inventory.wrote and inventory.boundary == target]
    torn = [rank for rank in ranks if rank not in sources]
    absent = [rank for rank, inventory in ranks.items() if target not in inventory.tensors and rank in torn]
    if not absent:
        return RecoveryPlan(action="in_place", target=target, reason="every shard is live or in the node's memory", logs=logs)
    if replicated and sources:
        donors = {rank: sources[i % len(sources)] for i, rank in enumerate(absent)}
        return RecoveryPlan(action="in_place", target=target, reason="shards come from live replicas", donors=donors, logs=logs)
    return _rewind(ranks, target, f"the shard of rank {absent[0]} at step {target} has no live replica and is not committed")


def _goes_back(inventory: RankInventory, target: int) -> bool:
    """Whether a rank needs its local state of `target`: only one that stands between steps just there goes on as it is."""
    return not inventory.alive or inventory.in_step or inventory.wrote or inventory.boundary != target


def _furthest(ranks: Mapping[int, RankInventory]) -> dict[str, tuple[int, int]]:
    logs: dict[str, tuple[int, int]] = {}
    for rank, inventory in sorted(ranks.items()):
        for group, count in inventory.counters.items():
            if group not in logs or count > logs[group][0]:
                logs[group] = (count, rank)
    return logs


def _rewind(ranks: Mapping[int, RankInventory], target: int, why: str) -> RecoveryPlan:
    common = frozenset.intersection(*(inventory.tensors for inventory in ranks.values()))
    steps = [step for step in common if step <= target]
    if not steps:
        return RecoveryPlan(action="restart", target=-1, reason=why, repeated_steps=target)
    newest = max(steps)
    return RecoveryPlan(action="rewind", target=newest, reason=why, repeated_steps=target - newest)
