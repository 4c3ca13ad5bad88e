"""The coordinator of one node: from a fault to the resumed job.

States of a recovery: stopping (every live rank is told to stand still; dead ranks get a spare) -> planned (the plan went out) ->
resumed (every rank has completed a step). A further fault in any state begins the next generation from the start, with what is then
there; nothing of a recovery is remembered that the ranks do not report anew. What can fail: no spare becomes ready or a rank does not
stand still within `recovery.regroup_timeout_s` -> the rank is killed and counts as dead, or the job ends with a message that names it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lightning_gemini.agent.member import Member
from lightning_gemini.agent.memory import BOUNDARY, FAULT_NS, HEARTBEAT_NS, Board, NodeFiles, step_of
from lightning_gemini.agent.messages import Assign, Plan, Progress, Recover, Recovered
from lightning_gemini.recovery.plan import RankInventory, RecoveryPlan, plan
from lightning_gemini.snapshot.collective_log import CollectiveLog
from lightning_gemini.snapshot.slots import SlotFile
from lightning_gemini.telemetry.events import PHASES, EventLog


@dataclass(slots=True)
class Recovery:
    """One recovery under way."""

    generation: int
    reason: str
    fault_ns: int
    begun_ns: int
    stopped_ns: int = 0
    plan: RecoveryPlan | None = None
    reached: dict[str, dict[int, int]] = field(default_factory=lambda: {"restored": {}, "regrouped": {}, "resumed": {}})
    """phase -> rank -> when, monotonic ns."""


class Coordinator:
    """Decides recoveries over the members of one node. Not thread-safe: it lives in the agent's event loop."""

    def __init__(self, world: int, files: NodeFiles, *, replicated: Callable[[], bool], max_faults_per_step: Callable[[], int]) -> None:
        self.world, self.files = world, files
        self.board = Board(files.board, world)
        self.generation = 0
        self.recovery: Recovery | None = None
        self.recoveries: list[Recovered] = []
        self.events: EventLog | None = None
        self._replicated, self._max_faults = replicated, max_faults_per_step
        self._faults: Counter[int] = Counter()

    def fault(self, rank: int, reason: str, members: Mapping[int, Member], at_ns: int = 0) -> str | None:
        """A rank died or raised: begin a generation. Returns why the job must end instead, or None."""
        step = step_of(self.board.get(rank, BOUNDARY))
        self._faults[step] += 1
        self._emit("fault", rank=rank, step=step, reason=reason)
        if self._faults[step] > self._max_faults():
            return f"{self._faults[step]} faults in step {step} (recovery.max_faults_per_step={self._max_faults()})"
        injected, now = self.board.get(rank, FAULT_NS), time.monotonic_ns()
        previous = self.recovery
        self.generation += 1
        begun = previous.fault_ns if previous else at_ns or injected or now
        self.board.set(rank, FAULT_NS, 0)
        self.recovery = Recovery(self.generation, reason, begun, now)
        for member in members.values():
            member.stopped = None
            member.send(Recover(generation=self.generation, reason=reason))
        self._emit("recover", generation=self.generation, reason=reason)
        return None

    def assign(self, spare: Member, rank: int) -> None:
        """Give a dead rank to a spare."""
        self.board.set(rank, HEARTBEAT_NS, time.monotonic_ns())  # its predecessor's last beat is not its own
        spare.rank, spare.waiting, spare.fresh, spare.in_fit = rank, False, True, True
        spare.send(Assign(rank=rank, generation=self.generation))
        self._emit("assign", rank=rank, generation=self.generation, spare_pid=spare.child.pid)

    def try_plan(self, members: Mapping[int, Member]) -> RecoveryPlan | None:
        """Decide, as soon as every rank is filled and stands still. Returns the plan when it was made just now."""
        recovery = self.recovery
        if recovery is None or recovery.plan is not None or len(members) < self.world:
            return None
        if any(member.stopped is None and not member.fresh for member in members.values()):
            return None
        inventory = {rank: self._inventory(rank, member) for rank, member in members.items()}
        recovery.stopped_ns = time.monotonic_ns()
        recovery.plan = decided = plan(inventory, replicated=self._replicated())
        self._emit("plan", generation=self.generation, action=decided.action, target=decided.target, reason=decided.reason,
                   donors={str(k): v for k, v in decided.donors.items()}, repeated_steps=decided.repeated_steps)  # fmt: skip
        if decided.action != "restart":
            message = Plan(
                generation=self.generation,
                target=decided.target,
                rewind=decided.action == "rewind",
                replaced=sorted(rank for rank, inventory_ in inventory.items() if not inventory_.alive),
                donors=decided.donors,
                logs=decided.logs,
            )
            for member in members.values():
                member.fresh = False
                member.send(message)
        return decided

    def _inventory(self, rank: int, member: Member) -> RankInventory:
        ledger, arena, log = SlotFile(self.files.ledgers[rank]), SlotFile(self.files.arenas[rank]), CollectiveLog(self.files.logs[rank])
        try:
            stopped = member.stopped
            alive = stopped is not None and not stopped.unwinding
            return RankInventory(
                alive=alive,
                boundary=stopped.step if alive and stopped else step_of(self.board.get(rank, BOUNDARY)),
                wrote=bool(alive and stopped and stopped.wrote),
                in_step=bool(alive and stopped and stopped.in_step),
                local=frozenset(slot.step for slot in ledger.slots()),
                tensors=frozenset(slot.step for slot in arena.slots()),
                counters=stopped.counters if alive and stopped else log.counters(),
            )
        finally:
            for file in (ledger, arena, log):
                file.close()

    def progress(self, rank: int, message: Progress) -> Recovered | None:
        """A rank has finished a phase; returns the summary when the last one has resumed."""
        recovery = self.recovery
        if recovery is None or message.phase not in recovery.reached or message.generation != self.generation or recovery.plan is None:
            return None
        recovery.reached[message.phase][rank] = time.monotonic_ns()
        if len(recovery.reached["resumed"]) < self.world:
            return None
        marks = [recovery.fault_ns, recovery.begun_ns, recovery.stopped_ns]
        marks += [max(recovery.reached[phase].values(), default=0) for phase in ("restored", "regrouped", "resumed")]
        for i in range(1, len(marks)):  # a rank may report a later phase before another's earlier one
            marks[i] = max(marks[i], marks[i - 1])
        seconds = {phase: (marks[i + 1] - marks[i]) / 1e9 for i, phase in enumerate(PHASES)}
        summary = Recovered(
            generation=self.generation, reason=recovery.reason, step=recovery.plan.target, seconds=seconds, count=len(self.recoveries) + 1
        )
        self.recoveries.append(summary)
        self.recovery = None
        self._emit("recovered", generation=self.generation, reason=summary.reason, step=summary.step, seconds=seconds,
                   repeated_steps=recovery.plan.repeated_steps)  # fmt: skip
        return summary

    def _emit(self, event: str, **fields: object) -> None:
        if self.events is not None:
            self.events.emit(event, **fields)
