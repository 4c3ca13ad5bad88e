"""A node of the job, as its membership sees it: what happens here in a recovery, and how the job ends.

Seam: the membership's `Observer`. `fault` asks for a recovery, `fill` goes on with one after any news of a process, `end` ends the job on
all nodes. States and failures of a recovery are in `agent.coordinator`; this is what they mean for the processes of the node.

A node in no roster is a spare: it keeps a warm process for each rank that it may be given. A node that is expelled ends its processes at
once; whoever runs it may offer it again.
"""

from __future__ import annotations

import selectors
import sys
import time
from collections import Counter
from collections.abc import Mapping

from lightning_gemini.agent.coordinator import Coordinator
from lightning_gemini.agent.crew import MAX_SPARE_FAILURES, Crew
from lightning_gemini.agent.job import Job
from lightning_gemini.agent.member import Member
from lightning_gemini.agent.memory import END_AT
from lightning_gemini.agent.messages import Begin, Fault
from lightning_gemini.agent.persisting import Persisting
from lightning_gemini.agent.spawn import Spawner
from lightning_gemini.agent.variables import rank_variables
from lightning_gemini.config import GeminiConfig
from lightning_gemini.membership.records import Ending, Generation, NodeInfo, Outcome
from lightning_gemini.recovery.plan import RecoveryPlan
from lightning_gemini.storage import process as storage
from lightning_gemini.storage.messages import Opened


class Node:
    """See the module's docstring."""

    def __init__(self, crew: Crew, ranks_per_node: int, selector: selectors.BaseSelector, storage_spawner: Spawner | None = None) -> None:
        self.crew, self.ranks_per_node = crew, ranks_per_node
        self.storage_spawner = storage_spawner or storage.spawner()
        self.persisting = Persisting(self, selector)
        self.coordinator = Coordinator(crew, ranks_per_node, self.persisting)
        self.job: Job
        self.exit_status: int | None = None
        self.expelled = False
        self.configured = False
        """A process of this node has reached `fit`."""
        self._founder = False
        """It has its place since the job began."""
        self._filling = False
        """The arenas are being filled from a checkpoint."""
        self.ending_since: float | None = None
        """The job ends by a signal, to this node's agent or another's: nobody is replaced any more."""
        self.nobody = False
        """In this recovery: no process of this node had reached `fit`, so that the job has no step yet; there is nothing to keep or to
        fill, all ranks will start anew. A node that came later has ranks to fill, however many recoveries begin before they are."""
        self.deadline = float("inf")
        """By when the ranks of this node must stand still."""

    @property
    def config(self) -> GeminiConfig:
        """The strategy's options, once a rank has told them."""
        return self.coordinator.config

    # ---- processes

    def start(self, rank: int | None) -> None:
        """Start a rank, or (None) a spare."""
        coordinator = self.coordinator
        environment = rank_variables(coordinator.world - 1 if rank is None else rank, coordinator.world, self.ranks_per_node) | {
            "LIGHTNING_GEMINI_WORLD": str(coordinator.world),
            "LIGHTNING_GEMINI_PER_NODE": str(self.ranks_per_node),
            "LIGHTNING_GEMINI_HOSTS": ",".join(coordinator.hosts),
            "LIGHTNING_GEMINI_JOB": self.job.name,
            "LIGHTNING_GEMINI_TOKEN": self.job.token,
            "LIGHTNING_GEMINI_GENERATION": str(coordinator.number),
        }
        self.crew.start(rank, environment, coordinator.files)

    def start_spares(self) -> None:
        """Keep as many as are wanted."""
        if self.ending_since is not None or self.crew.spare_failures >= MAX_SPARE_FAILURES or self.exit_status is not None:
            return
        vacant = self.ranks_per_node - len(self.crew.ranks()) - len(self.crew.done())
        if self.coordinator.index is None:
            wanted = self.ranks_per_node
        else:
            wanted = max(self.config.recovery.spares, vacant if self.coordinator.recovery else 0)
        for _ in range(wanted - len(self.crew.idle())):
            self.start(None)

    # ---- recovery

    def fault(self, member: Member, reason: str, raised: Fault | None = None) -> None:
        """A rank of this node died or raised."""
        assert member.rank is not None
        ending = self.coordinator.fault(member.rank, reason, raised.at_ns if raised else 0)
        if ending is not None:
            what = f"{member.name} raised in {raised.where}:\n{raised.error}" if raised else reason
            self.end(1, f"{ending}; the last: {what}")
        self.coordinator.membership.poll()  # on one node the generation has begun: a further fault belongs to it

    def on_generation(self, generation: Generation, nodes: Mapping[str, NodeInfo]) -> None:
        """See `membership.base.Observer`."""
        index = self.job.index_in(generation)
        shared = [host for host, count in Counter(nodes[node].host for node in generation.roster if node).items() if count > 1]
        if shared:
            self.end(1, f"two nodes have the address {shared[0]}: give each its own with --host, one that the others reach")
            return
        if generation.number == 0 or index is None:
            self._founder = index is not None
            self.coordinator.form(generation, nodes, index)
            for rank in self.coordinator.own_ranks():
                self.start(rank)
            if index is None:
                self.start_spares()
            return
        if generation.number != self.coordinator.number:  # else its vacant places were filled
            self.nobody = self._founder and not self.configured
        self.coordinator.begin(generation, nodes, index)
        patience_s = float("inf") if self.coordinator.lacks_nodes else self.config.recovery.regroup_timeout_s
        self.deadline = time.monotonic() + patience_s
        self.fill()

    def fill(self) -> None:
        """Go on with a recovery: give dead ranks to spares, then report what this node has."""
        coordinator = self.coordinator
        if coordinator.recovery is None or coordinator.recovery.stopped_ns:
            return
        if not self.nobody:
            for rank in sorted(set(coordinator.own_ranks()) - set(self.crew.ranks())):
                spare = self.crew.warm()
                if spare is None:
                    self.start_spares()
                    return
                if coordinator.lacks_nodes:  # it is to meet all others, and would not find them
                    return
                coordinator.assign(spare, rank)
        coordinator.try_report(nobody=self.nobody)

    def on_plan(self, number: int, plan: RecoveryPlan) -> None:
        """See `membership.base.Observer`."""
        if not self.coordinator.take(number, plan):
            return
        if plan.action == "end":
            self.end(1, plan.reason)
        elif plan.action == "restart" and plan.repeated_steps:
            self.end(1, f"nothing to go back to: {plan.reason}, no older snapshot is complete; {plan.repeated_steps} completed "
                         "steps are lost, resume from your last checkpoint")  # fmt: skip
        elif plan.action == "restart":
            self._restart()
        else:
            self.coordinator.fetch(number, plan, failed=lambda error: self._on_fetch_failed(number, error))

    def begin_in(self, member: Member, given: str, given_step: int) -> None:
        """A rank has reached `fit` and asks where to begin. Of the user's checkpoint and that in storage the newer one counts."""
        first, member.begun = not member.begun, True

        def told(opened: Opened) -> None:
            coordinator = self.coordinator
            here = (coordinator.world, len(coordinator.generation.roster), coordinator.replicated)
            same = (opened.world, opened.nodes, opened.replicated) == here
            theirs = given_step > opened.step and self.config.persistent.resume == "auto"
            if given and opened.path and first and member.rank == 0:
                both = f"{given} (step {given_step})", f"{opened.path} (step {opened.step})"
                self.say("the job goes on from {}, not from {}".format(*(both if theirs else both[::-1])))
            if not opened.path or not first or theirs:
                member.send(Begin())
            elif not same:
                member.send(Begin(load=opened.path))
            else:
                member.send(Begin(land=True))
                self._begin_from(opened)

        self.persisting.where_to_begin(told)

    def _begin_from(self, opened: Opened) -> None:
        """All ranks of this node land at a checkpoint, once it is in their arenas."""
        members = [member for member in self.crew.ranks().values() if member.begun]
        number = self.coordinator.number
        if len(members) < self.ranks_per_node or self._filling:
            return
        self._filling = True

        def filled(error: str) -> None:
            self._filling = False
            if error:
                self.end(1, f"the checkpoint {opened.path} could not be read: {error}")
            elif number == self.coordinator.number:
                self.say(f"the job goes on from step {opened.step} ({opened.path})") if self.coordinator.index == 0 else None
                self.coordinator.land_all(opened.step)

        self.persisting.fill(opened.path, filled)

    def _on_fetch_failed(self, number: int, error: BaseException) -> None:
        if number == self.coordinator.number:
            self.say(f"state could not be fetched from other nodes: {error}")
            self.coordinator.membership.begin(number, f"state could not be fetched: {error}", step=-1)

    def _restart(self) -> None:
        self.say("a rank was lost before the first step boundary: all ranks start anew")
        self.crew.end_all()
        self.crew.members.clear()
        self.coordinator.reopen()
        for rank in self.coordinator.own_ranks():
            self.start(rank)
        if self.configured:
            self.start_spares()

    def on_recovered(self, outcome: Outcome) -> None:
        """See `membership.base.Observer`."""
        summary = self.coordinator.over(outcome)
        if summary is None:
            return
        total = sum(summary.seconds.values())
        phases = ", ".join(f"{phase} {seconds:.3f}" for phase, seconds in summary.seconds.items())
        again = f", {outcome.repeated_steps} completed steps computed again" if outcome.repeated_steps else ""
        self.say(f"recovered in {total:.3f} s at step {summary.step} ({phases}){again}: {summary.reason}")
        for other in self.crew.ranks().values():
            other.send(summary)
        self.persisting.look()
        self.crew.spare_failures = 0
        self.start_spares()

    def on_ending(self, ending: Ending) -> None:
        """See `membership.base.Observer`."""
        if self.exit_status is None:
            self.exit_status = ending.status
            self.coordinator.emit("end", exit_status=ending.status, reason=ending.reason)
            if ending.status and ending.reason:
                self.say(ending.reason)

    def on_expelled(self, why: str) -> None:
        """See `membership.base.Observer`."""
        self.expelled = True
        self.coordinator.remember_lost()
        self.coordinator.emit("expelled", reason=why)
        self.say(f"this node has left the job: {why}")

    def end_after(self, step: int) -> None:
        """All ranks of this node inside `fit` end after `step`."""
        self.ending_since = self.ending_since or time.monotonic()
        for rank, member in self.crew.ranks().items():
            if member.in_fit and step > 1:
                self.coordinator.board.set(self.coordinator.place(rank), END_AT, step)

    def on_news(self, text: str) -> None:
        """See `membership.base.Observer`."""
        self.say(text)

    def end(self, status: int, reason: str) -> None:
        """End the job, on all nodes; the first reason counts."""
        ending = Ending(status=status, reason=reason)
        self.on_ending(ending)
        self.coordinator.membership.end(ending)

    def say(self, text: str) -> None:
        """One line for the user."""
        print(f"lightning_gemini: {text}", file=sys.stderr, flush=True)
