"""The decision: from what every rank has, what everyone does. Pure, no I/O, no torch; used by the membership's leader.

Seam: `plan(inventory) -> RecoveryPlan`. The ladder, per shard: live replica, own node's memory, a peer's memory, persistent storage. The
target is the newest step that every rank's local state *and* every shard can be restored to. Because a rank leaves step s only when all
ranks have committed the boundary s + 1 (see `recovery.engine`), survivors are never ahead of it by more than a write that they take back in
place.

A rank whose node is gone has nothing: what is left of it are replicas of what travels, at peers, and twins of the rest (see `ownership`).

Outcomes:
    in place   survivors stay inside their step (or their collective) and repeat it; the replaced land at the target.
    rewind     some shard at the target is nowhere (cadence > 1 and a torn write, or a node died before its newest snapshot was
               replicated): everybody re-enters `fit` from the newest snapshot that all have; completed steps after it are repeated, and
               the plan says how many.
    restart    a rank died before the first boundary: there is nothing to restore and nothing to lose, processes start anew.
    end        the reports make no sense; the job ends with the reason.
    storage    no snapshot is left in memory for some shard, or only one older than the checkpoint: everybody goes back to persistent
               storage, at `target`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

Replicas = Mapping[int, Mapping[int, Mapping[int, str]]]
"""node index -> rank of another node -> step -> key of the twins; see `snapshot.manifest`."""


class Fetch(NamedTuple):
    """Where a node finds the snapshot of one of its ranks."""

    travel_from: list[int]
    """Nodes that keep a replica of what travels."""
    shared_from: list[tuple[int, int]]
    """(node, twin rank) that hold the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankInventory:
    """What one rank has, when everybody stands still."""

    alive: bool
    """It stands in its step or collective and can go on from there; False for a dead or unwinding rank."""
    boundary: int
    """Step of its newest committed boundary (local state), -1 if none."""
    at: int = -1
    """The step it is in: it has left all before. -1 for a dead rank."""
    wrote: bool = False
    """Its optimizer has begun to write the step `boundary`: its live tensors are torn (or one ahead)."""
    in_step: bool = False
    local: frozenset[int] = frozenset()
    """Steps whose rank-local state is committed in its ledger."""
    tensors: frozenset[int] = frozenset()
    """Steps whose owned tensors are committed in its arena."""
    keys: Mapping[int, str] = field(default_factory=dict)
    """Step -> key of its twins, of what is in its arena."""
    counters: Mapping[str, int] = field(default_factory=dict)
    """Collectives completed outside steps, by group."""
    donors: frozenset[int] = frozenset()
    """Ranks of its node whose live tensors are, or include, all of its state (DDP: all; FSDP2: none): while they have not written, each of
    them can stand in for a snapshot."""

    @property
    def lost(self) -> bool:
        """Nothing of it is left on its node."""
        return not self.alive and self.boundary < 0 and not self.tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryPlan:
    """See the module's docstring. `donors`: rank without a committed shard -> live rank of its node that writes it on its behalf."""

    action: str
    target: int
    reason: str
    donors: dict[int, int] = field(default_factory=dict)
    logs: dict[str, tuple[int, int]] = field(default_factory=dict)
    """group -> (collectives completed by the furthest rank, that rank)."""
    repeated_steps: int = 0
    replaced: list[int] = field(default_factory=list)
    """Ranks that land: their processes are new, or re-enter `fit`."""
    path: str = ""
    """storage: the checkpoint."""
    fetch: dict[int, Fetch] = field(default_factory=dict)
    """Rank whose snapshot at `target` its node must fetch from other nodes first."""


@dataclass(frozen=True, slots=True)
class Inventory:
    """What the whole job has."""

    ranks: Mapping[int, RankInventory]
    ranks_per_node: int
    replicas: Replicas
    persisted: tuple[int, str]

    def node(self, rank: int) -> int:
        """Index of a rank's node."""
        return rank // self.ranks_per_node

    def fetch(self, rank: int, step: int) -> Fetch | None:
        """Where the snapshot of `rank` at `step` can be had over the network; None: nowhere."""
        found = {node: kept[rank][step] for node, kept in self.replicas.items() if rank in kept and step in kept[rank]}
        for key in sorted(set(found.values())):
            equal = [other for other, inventory in self.ranks.items() if inventory.keys.get(step) == key]
            twins = [(self.node(other), other) for other in equal if self.node(other) != self.node(rank)]
            if not key or twins:
                return Fetch(sorted(node for node, its in found.items() if its == key), twins if key else [])
        return None

    def has(self, rank: int, step: int) -> bool:
        """Whether the snapshot of `rank` at `step` is in its node's memory or in a peer's."""
        return step in self.ranks[rank].tensors or self.fetch(rank, step) is not None

    def restorable(self, rank: int) -> set[int]:
        """Steps at which the snapshot of a lost rank can be had."""
        steps = {step for kept in self.replicas.values() for step in kept.get(rank, ())}
        return {step for step in steps if self.fetch(rank, step) is not None}


def plan(
    ranks: Mapping[int, RankInventory],
    *,
    ranks_per_node: int = 0,
    replicas: Replicas | None = None,
    persisted: tuple[int, str] = (-1, ""),
    lost: int = -1,
) -> RecoveryPlan:
    """Decide a recovery.

    Args:
        ranks: inventory of every rank of the world, dead ones included.
        ranks_per_node: 0 for all on one node.
        replicas: what nodes keep of each other.
        persisted: step (-1 if there is none) and path of the newest checkpoint in persistent storage.
        lost: newest step of which a node knows that it was completed, although nothing of it may be left.
    """
    if not ranks:
        raise ValueError("ranks={} is not valid: give the inventory of every rank of the world")
    job = Inventory(ranks, ranks_per_node or len(ranks), replicas or {}, persisted)
    gone = [rank for rank, inventory in ranks.items() if inventory.lost]
    known = [inventory.boundary for inventory in ranks.values() if not inventory.lost]
    newest = min(known, default=-1)
    if newest < 0:
        return _from_storage(job, lost, "a rank had no boundary yet" if known else "no rank has anything left")
    target = newest
    for rank in gone:
        steps = {step for step in job.restorable(rank) if step <= target}
        if not steps:
            return _from_storage(job, newest, f"nothing of rank {rank} is left in any node's memory")
        target = max(steps)
    return _from_memory(job, target, newest)


def _from_memory(job: Inventory, target: int, newest: int) -> RecoveryPlan:
    ranks = job.ranks
    ahead = [rank for rank, inventory in ranks.items() if inventory.alive and inventory.at > target]
    if ahead:
        return _rewind(job, target, newest, f"the snapshot of step {target} is the newest that all have, rank {ahead[0]} is past it")
    left = {rank: inventory for rank, inventory in ranks.items() if not inventory.lost}
    lacking = [rank for rank, inventory in left.items() if target not in inventory.local and _goes_back(inventory, target)]
    if lacking:
        return _rewind(job, target, newest, f"rank {lacking[0]} has no local state of step {target}")
    sources = [rank for rank, inventory in ranks.items() if inventory.alive and not inventory.wrote and inventory.boundary == target]
    absent = [rank for rank, inventory in ranks.items() if target not in inventory.tensors and rank not in sources]
    fetch: dict[int, Fetch] = {}
    donors: dict[int, int] = {}
    for place, rank in enumerate(absent):
        near = [source for source in sources if source in ranks[rank].donors]
        found = job.fetch(rank, target)
        if near:
            donors[rank] = near[place % len(near)]
        elif found is not None:
            fetch[rank] = found
        else:
            return _rewind(job, target, newest, f"the shard of rank {rank} at step {target} has no live replica and is not committed")
    reason = "every shard is live or in the node's memory"
    if donors or fetch:
        reason = " and ".join(["shards come from live replicas"] * bool(donors) + ["shards come from peers' memory"] * bool(fetch))
    logs, replaced = _furthest(ranks), _dead(ranks)
    return RecoveryPlan(action="in_place", target=target, reason=reason, donors=donors, logs=logs, replaced=replaced, fetch=fetch)


def _goes_back(inventory: RankInventory, target: int) -> bool:
    """Whether a rank needs its local state of `target`: only one that stands between steps just there goes on as it is."""
    return not inventory.alive or inventory.in_step or inventory.wrote or inventory.boundary != target


def _dead(ranks: Mapping[int, RankInventory]) -> list[int]:
    return sorted(rank for rank, inventory in ranks.items() if not inventory.alive)


def _furthest(ranks: Mapping[int, RankInventory]) -> dict[str, tuple[int, int]]:
    logs: dict[str, tuple[int, int]] = {}
    for rank, inventory in sorted(ranks.items(), key=lambda item: (not item[1].alive, item[0])):  # a rank that lands begins its log anew
        for group, count in inventory.counters.items():
            if group not in logs or count > logs[group][0]:
                logs[group] = (count, rank)
    return logs


def _rewind(job: Inventory, target: int, newest: int, why: str) -> RecoveryPlan:
    candidates = {step for inventory in job.ranks.values() for step in inventory.tensors if step <= target}
    steps = [step for step in candidates if all(job.has(rank, step) for rank in job.ranks)]
    if not steps or max(steps) < job.persisted[0] <= newest:
        return _from_storage(job, newest, why)
    best = max(steps)
    fetch = {rank: found for rank in job.ranks if best not in job.ranks[rank].tensors and (found := job.fetch(rank, best)) is not None}
    return RecoveryPlan(
        action="rewind", target=best, reason=why, repeated_steps=newest - best, replaced=_dead(job.ranks), fetch=fetch
    )  # fmt: skip


def _from_storage(job: Inventory, newest: int, why: str) -> RecoveryPlan:
    step, path = job.persisted
    if newest > 0 and step >= 0:
        return RecoveryPlan(action="storage", target=step, reason=why, repeated_steps=newest - step, replaced=_dead(job.ranks), path=path)
    return RecoveryPlan(action="restart", target=-1, reason=why, repeated_steps=max(newest, 0))
