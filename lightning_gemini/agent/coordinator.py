"""A node's part in recoveries: from a fault, here or elsewhere, to ranks that go on.

Seam: an `Observer` of the membership; the supervisor tells it of faults, of ranks that stand still and of phases that are over. The
decision itself is made once for all nodes, by the membership's leader, from what every node reports (`decide`).

States of a recovery: stopping (a generation has begun; every live rank is told to stand still, dead ranks get a spare) -> reported ->
planned (the plan is there; what must come from other nodes is fetched, then the ranks are told) -> resumed (every rank here has completed
a step) -> over. A further fault in any state begins the next generation from the start, with what is then there; nothing of a recovery is
remembered that the ranks do not report anew. What can fail: no spare becomes ready or a rank does not stand still within
`recovery.regroup_timeout_s` -> the rank is killed and counts as dead, or the job ends with a message that names it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lightning_gemini.agent.crew import Crew
from lightning_gemini.agent.inventory import inventory_of
from lightning_gemini.agent.member import Member
from lightning_gemini.agent.memory import BOUNDARY, FAULT_NS, HEARTBEAT_NS, HOLD, Board, NodeFiles, create_files, step_of
from lightning_gemini.agent.messages import Assign, Plan, Progress, Recover, Recovered
from lightning_gemini.agent.other_nodes import OtherNodes
from lightning_gemini.agent.persisting import Persisting
from lightning_gemini.config import GeminiConfig
from lightning_gemini.membership.base import Membership
from lightning_gemini.membership.records import Completed, Generation, NodeInfo, NodeReport, Outcome
from lightning_gemini.membership.roster import VACANT
from lightning_gemini.recovery.plan import RankInventory, RecoveryPlan
from lightning_gemini.telemetry.events import EventLog


@dataclass(slots=True)
class Recovery:
    """One recovery under way on this node."""

    began_ns: int
    fault_ns: int
    reason: str
    stopped_ns: int = 0
    inventory: dict[int, RankInventory] = field(default_factory=dict)
    """Of the ranks of this node, as reported."""
    plan: RecoveryPlan | None = None
    reached: dict[str, dict[int, int]] = field(default_factory=lambda: {"restored": {}, "regrouped": {}, "resumed": {}})
    """phase -> rank -> when, monotonic ns."""


class Coordinator:
    """See the module's docstring. Not thread-safe: it lives in the agent's event loop."""

    def __init__(self, crew: Crew, ranks_per_node: int, persisting: Persisting) -> None:
        self.crew, self.ranks_per_node, self.persisting = crew, ranks_per_node, persisting
        self.config, self.replicated = GeminiConfig(), True
        self.membership: Membership
        self.others: OtherNodes | None = None
        self.events: EventLog | None = None
        self.generation = Generation(number=0, roster=[])
        self.nodes: Mapping[str, NodeInfo] = {}
        self.index: int | None = None
        """This node's place in the roster, None for a spare node."""
        self.lost_step = -1
        """See `NodeReport`."""
        self.recovery: Recovery | None = None
        self.recoveries: list[Recovered] = []
        self._open()

    def _open(self) -> None:
        self.files: NodeFiles = create_files(self.ranks_per_node)
        self.board = Board(self.files.board, self.ranks_per_node)

    def reopen(self) -> None:
        """Empty memory, for processes that start anew."""
        self.persisting.reopen()
        self._close_memory()
        self._open()
        self.recovery = None
        if self.others is not None:
            self.others.open(self)

    def _close_memory(self) -> None:
        self.board.close()
        self.files.close()

    def close(self) -> None:
        """Give everything back."""
        if self.others is not None:
            self.others.close()
        self._close_memory()
        if self.events is not None:
            self.events.close()

    def form(self, generation: Generation, nodes: Mapping[str, NodeInfo], index: int | None) -> None:
        """The job begins, or goes on without this node."""
        self.generation, self.nodes, self.index = generation, nodes, index
        if self.others is not None and index is not None:
            self.others.open(self)

    # ---- who is where

    @property
    def number(self) -> int:
        """The present generation."""
        return self.generation.number

    @property
    def world(self) -> int:
        """Ranks of the job."""
        return len(self.generation.roster) * self.ranks_per_node

    @property
    def first(self) -> int:
        """The first rank of this node."""
        return (self.index or 0) * self.ranks_per_node

    @property
    def lacks_nodes(self) -> bool:
        """Whether a place in the roster is vacant."""
        return VACANT in self.generation.roster

    @property
    def hosts(self) -> list[str]:
        """Of the nodes by index; empty on a single node."""
        roster = self.generation.roster
        return [self.nodes[node].host if node else "" for node in roster] if len(roster) > 1 else []

    def own_ranks(self) -> range:
        """The ranks that this node has, or shall have."""
        return range(0) if self.index is None else range(self.first, self.first + self.ranks_per_node)

    def place(self, rank: int) -> int:
        """A rank's number on this node."""
        return rank - self.first

    def configure(self, config: GeminiConfig, *, replicated: bool) -> None:
        """A rank has told the strategy's options."""
        self.config, self.replicated = config, replicated
        if self.others is not None and self.index is not None:
            self.others.place()

    def on_voted(self) -> None:
        """Words of ranks of this node have changed."""
        if self.others is not None:
            self.others.voted()

    def ask_to_end(self) -> bool:
        """All ranks shall end after the same step; False when that is for this node to say."""
        if self.others is None:
            return False
        self.others.ask_to_end()
        return True

    # ---- persistent storage

    def hold(self, step: int) -> None:
        """Captures may not overwrite the snapshot of `step`; -1: any more."""
        self.board.set(self.board.job, HOLD, step + 1)
        self.on_voted()

    def on_written(self, word: int) -> None:
        """This node has written its part of a checkpoint."""
        if self.others is None:
            self.persisting.all_have_written(word)
        else:
            self.others.voted()

    def on_complete(self, word: int) -> None:
        """On the node at index 0: a checkpoint is complete."""
        self.persisting.complete(word)
        if self.others is not None:
            self.others.completed(word)

    def land_all(self, step: int) -> None:
        """The job begins at a checkpoint, which is in the arenas."""
        message = Plan(
            generation=self.number, target=step, rewind=True, replaced=list(range(self.world)), donors={}, logs={}, hosts=self.hosts
        )
        for member in self.crew.ranks().values():
            member.send(message)

    # ---- a fault

    def fault(self, rank: int, reason: str, at_ns: int = 0) -> str | None:
        """A rank of this node died or raised: ask for a generation. Returns why the job must end instead, or None."""
        board, last, place, most = self.board, self.generation, self.place(rank), self.config.recovery.max_faults_per_step
        step = step_of(board.get(place, BOUNDARY))
        count = last.faults + 1 if last.fault_step == step else 1
        self.emit("fault", rank=rank, step=step, reason=reason)
        if count > most:
            return f"{count} faults in step {step} (recovery.max_faults_per_step={most})"
        now, injected = time.monotonic_ns(), board.get(place, FAULT_NS)
        board.set(place, FAULT_NS, 0)
        begun = self.recovery.fault_ns if self.recovery else at_ns or injected or now
        self.membership.begin(self.number, reason, step=step, detect_s=(now - begun) / 1e9)
        return None

    def begin(self, generation: Generation, nodes: Mapping[str, NodeInfo], index: int) -> None:
        """A generation has begun, with this node in it."""
        if generation.number == self.number and self.recovery is not None:  # its vacant places were filled, nothing else is new
            self.generation, self.nodes = generation, nodes
            if self.others is not None:
                self.others.open(self)
            return
        now = time.monotonic_ns()
        fault_ns = min(self.recovery.fault_ns if self.recovery else now, now - int(generation.detect_s * 1e9))
        self.generation, self.nodes, self.index = generation, nodes, index
        self.recovery = Recovery(now, fault_ns, generation.reason)
        if self.others is not None:
            self.others.open(self)
        for member in self.crew.living():
            member.stopped, member.fresh = None, False
            if member.rank is not None:
                member.send(Recover(generation=generation.number, reason=generation.reason))
        self.emit("recover", generation=generation.number, reason=generation.reason)

    def assign(self, spare: Member, rank: int) -> None:
        """Give a dead rank to a spare."""
        self.board.set(self.place(rank), HEARTBEAT_NS, time.monotonic_ns())  # its predecessor's last beat is not its own
        spare.rank, spare.waiting, spare.fresh, spare.in_fit = rank, False, True, True
        spare.send(Assign(rank=rank, generation=self.number, hosts=self.hosts))
        self.emit("assign", rank=rank, generation=self.number, spare_pid=spare.child.pid)

    # ---- what this node has

    def try_report(self, *, nobody: bool) -> None:
        """As soon as every rank of this node is filled and stands still; at once where `nobody` has anything to report."""
        recovery, ranks = self.recovery, self.crew.ranks()
        if recovery is None or recovery.stopped_ns or self.index is None:
            return
        if not nobody and not self.persisting.known:  # it may be the only one that can tell what to go back to
            return
        if nobody:
            found = {rank: RankInventory(alive=False, boundary=-1) for rank in self.own_ranks()}
        elif len(ranks) < self.ranks_per_node or any(member.stopped is None and not member.fresh for member in ranks.values()):
            return
        else:
            found = {rank: inventory_of(self.place(rank), member, self.files, self.board, self.first) for rank, member in ranks.items()}
        recovery.inventory = found
        recovery.stopped_ns = time.monotonic_ns()
        self.membership.report(
            NodeReport(
                number=self.number,
                index=self.index,
                ranks=found,
                replicas=self.others.replicas() if self.others else {},
                persisted=self.persisting.newest[0],
                persisted_path=self.persisting.newest[1],
                lost_step=self.lost_step,
                stopped_s=(recovery.stopped_ns - recovery.began_ns) / 1e9,
            )
        )

    # ---- the plan

    def take(self, number: int, decided: RecoveryPlan) -> bool:
        """The plan of generation `number` is there. False when it is not for us any more."""
        recovery = self.recovery
        if recovery is None or recovery.plan is not None or number != self.number:
            return False
        recovery.plan = decided
        self.emit("plan", generation=number, action=decided.action, target=decided.target, reason=decided.reason,
                  donors={str(k): v for k, v in decided.donors.items()}, fetch=sorted(decided.fetch),
                  repeated_steps=decided.repeated_steps)  # fmt: skip
        return True

    def counters(self, rank: int) -> Mapping[str, int]:
        """Collectives that a rank of this node goes on after, by group. One that lands goes through all again that came after its boundary,
        whatever its predecessor had completed: it wants all results that there are."""
        inventory = self.recovery.inventory.get(rank) if self.recovery else None
        return inventory.counters if inventory is not None and inventory.alive else {}

    def fetch(self, number: int, decided: RecoveryPlan, failed: Callable[[BaseException], None]) -> None:
        """Get what the plan needs from other nodes, then carry it out."""

        def done(error: BaseException | None) -> None:
            if error is not None:
                failed(error)
            elif decided.action == "storage":
                self.persisting.fill(decided.path, filled)
            else:
                self.carry_out(number)

        def filled(error: str) -> None:
            if error:
                failed(RuntimeError(error))
            else:
                self.carry_out(number)

        if self.others is None:
            done(None)
        else:
            self.others.fetch(decided, done)

    def carry_out(self, number: int) -> None:
        """Everything that the plan needs is on this node: tell the ranks."""
        recovery = self.recovery
        if recovery is None or recovery.plan is None or number != self.number:
            return
        decided = recovery.plan
        message = Plan(
            generation=number,
            target=decided.target,
            rewind=decided.action in ("rewind", "storage"),
            replaced=decided.replaced,
            donors=decided.donors,
            logs=decided.logs,
            hosts=self.hosts,
        )
        for member in self.crew.ranks().values():
            member.fresh = False
            member.send(message)

    # ---- the end of a recovery

    def progress(self, rank: int, message: Progress) -> None:
        """A rank has finished a phase; the last one to resume completes this node's part."""
        recovery = self.recovery
        if recovery is None or recovery.plan is None or message.phase not in recovery.reached or message.generation != self.number:
            return
        recovery.reached[message.phase][rank] = time.monotonic_ns()
        if len(recovery.reached["resumed"]) < self.ranks_per_node:
            return
        marks = [max(recovery.reached[phase].values(), default=0) for phase in ("restored", "regrouped", "resumed")]
        restored, regrouped, resumed = ((max(mark, recovery.stopped_ns) - recovery.began_ns) / 1e9 for mark in marks)
        assert self.index is not None
        self.membership.completed(
            Completed(number=self.number, index=self.index, restored_s=restored, regrouped_s=regrouped, resumed_s=resumed)
        )

    def over(self, outcome: Outcome) -> Recovered | None:
        """All nodes have resumed."""
        if self.recovery is None or outcome.number != self.number:
            return None
        summary = Recovered(
            generation=outcome.number,
            reason=outcome.reason,
            step=outcome.step,
            seconds=outcome.seconds,
            count=len(self.recoveries) + 1,
        )
        self.recoveries.append(summary)
        self.recovery = None
        self.emit("recovered", generation=outcome.number, reason=summary.reason, step=summary.step, seconds=summary.seconds,
                  repeated_steps=outcome.repeated_steps)  # fmt: skip
        return summary

    def remember_lost(self) -> None:
        """This node is expelled, its ranks end: only how far they were goes on with it."""
        self.lost_step = max(self.lost_step, *(step_of(self.board.get(place, BOUNDARY)) for place in range(self.ranks_per_node)))

    def emit(self, event: str, **fields: object) -> None:
        """Telemetry."""
        if self.events is not None:
            self.events.emit(event, **fields)
