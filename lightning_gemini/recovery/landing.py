"""How a replaced rank gets in: a spare that was given a rank, or a rank that left its loops and re-enters `fit` in its own process.

States: setting up (the script's own set-up runs, collectives answer alone) -> positioned (the plan is known, loops and loaders will enter
at the boundary's batch) -> landed (state restored, groups joined). It lands where its boundary was captured: in `on_train_start`, on
entering a step, or on leaving one; from there it runs like every other rank, reading the results of past collectives from a log.

Failure: another generation begins before it has landed -> it takes the new plan; if that asks for another boundary, it starts over
(`Rewind`). The listening thread answers the agent meanwhile: there is nothing to stop.
"""

from __future__ import annotations

from collections.abc import Callable

from lightning_gemini.agent.memory import TENSORS
from lightning_gemini.agent.messages import Plan, Stopped
from lightning_gemini.peers.errors import StaleGeneration
from lightning_gemini.recovery.engine import Engine, patience_s
from lightning_gemini.recovery.signals import Rewind
from lightning_gemini.rendezvous.link import Link
from lightning_gemini.rendezvous.world import Mode
from lightning_gemini.snapshot.manifest import manifest_of
from lightning_gemini.snapshot.slots import CorruptSnapshot, SlotFile
from lightning_gemini.state.local import Boundary


class Landing:
    """One attempt to get in."""

    def __init__(self, link: Link, *, first: bool = False) -> None:
        self.link, self.first = link, first
        """`first`: the job begins so, at a checkpoint."""
        self.plan: Plan | None = None
        self.boundary: Boundary | None = None
        self.room = 0, 0
        """What the snapshot memory must have room for, where this node is new: known before the plan, taken after it."""

    def answer(self) -> None:
        """In the listening thread, at a new generation: this rank has nothing to stop."""
        self.link.send(Stopped(generation=self.link.announced, step=-1, wrote=False, in_step=False, unwinding=True, counters={}))

    def fetched(self, place: int) -> list[Callable[[], bytes]]:
        """On a new node: the rank-local state, once it has been fetched."""
        plan = self._next_plan(float(2**31))
        file = SlotFile(self.link.files.arenas[place])
        slot = file.find(plan.target)
        return [] if slot is None else [lambda: manifest_of(file, slot)[0].local]

    def position(self, engine: Engine) -> None:
        """Wait for the plan, choose the boundary, make loops and loaders enter there."""
        self.plan = self._next_plan(patience_s(engine.config))
        engine.memory.allocate(*self.room)
        self.boundary = self._choose(engine, self.plan)
        engine.local.position(self.boundary)

    def _next_plan(self, timeout_s: float) -> Plan:
        while True:
            try:
                return self.link.wait_for_plan(self.link.announced, timeout_s)
            except StaleGeneration:
                continue

    def _choose(self, engine: Engine, plan: Plan) -> Boundary:
        memory = engine.memory
        slot = None if plan.rewind else memory.ledger.find(plan.target)
        if slot is not None:
            return engine.local.decode(memory.ledger.read(slot))
        data = memory.local_in_arena(plan.target)  # an older step, or this node is new and has fetched its ranks' snapshots
        boundary = engine.local.decode(data)
        memory.commit_local(data, boundary.step, boundary.kind)
        return boundary

    def land(self, engine: Engine) -> Boundary:
        """Restore and join; returns the boundary."""
        assert self.plan is not None and self.boundary is not None
        while True:
            try:
                self._restore(engine, self.plan, self.boundary)
                return self.boundary
            except StaleGeneration:
                self._take(engine, self._next_plan(patience_s(engine.config)))
            except (CorruptSnapshot, TimeoutError, RuntimeError) as failure:
                engine.failed_in_recovery(failure, self.plan.generation)
                self._take(engine, self._next_plan(patience_s(engine.config)))

    def _take(self, engine: Engine, plan: Plan) -> None:
        boundary = self._choose(engine, plan)
        assert self.boundary is not None
        if (boundary.kind, boundary.step) != (self.boundary.kind, self.boundary.step):
            raise Rewind(f"the plan has changed to step {boundary.step}")
        self.plan, self.boundary = plan, boundary

    def _restore(self, engine: Engine, plan: Plan, boundary: Boundary) -> None:
        memory, world = engine.memory, engine.world
        memory.forget_after(plan.target)
        memory.frozen.load(boundary.frozen)
        engine.local.regroup(boundary)
        self._await_sources(engine, plan)
        lacking = memory.restore_tensors(plan.target)
        memory.captured = plan.target
        engine.adopt(boundary)
        if plan.rewind:
            memory.clear_log()
        memory.log.rotate(boundary.counters)
        world.counters = dict(boundary.counters)
        engine.host.reset_after_abort(own_fault=True, wrapper=boundary.wrapper)
        engine.host.set_gradients(boundary.grads)
        engine.local.restore(boundary)
        engine.join(plan, lacking)
        memory.mark_frozen()
        world.mode = Mode.BETWEEN

    def _await_sources(self, engine: Engine, plan: Plan) -> None:
        """Until the own shard is there (a donor may be writing it) and all living owners have theirs."""
        memory, number, target = engine.memory, plan.generation, plan.target
        sharers = memory.sharers()
        others = [rank for rank in sharers if rank not in plan.replaced and not plan.rewind]
        mine = [rank for rank in sharers if rank in plan.replaced]

        def arrived() -> bool:
            donated = all(memory.has(rank, target) for rank in mine)
            return donated and all(memory.reached(TENSORS, rank, number, target) for rank in others)

        memory.wait_until(arrived, number, engine.config.recovery.regroup_timeout_s, f"the shards of step {target} did not arrive")
