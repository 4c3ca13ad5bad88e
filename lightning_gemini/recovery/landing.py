"""How a replaced rank gets in: a spare that was given a rank, or a rank that left its loops and re-enters `fit` in its own process.

States: setting up (the script's own set-up runs, collectives answer alone) -> positioned (the plan is known, loops and loaders will enter
at the boundary's batch) -> landed (state restored, groups joined). It lands where its boundary was captured: in `on_train_start`, on
entering a step, or on leaving one; from there it runs like every other rank, reading the results of past collectives from a log.

Failure: another generation begins before it has landed -> it takes the new plan; if that asks for another boundary, it starts over
(`Rewind`). The listening thread answers the agent meanwhile: there is nothing to stop.
"""

from __future__ import annotations

import time

from lightning_gemini.agent.memory import TENSORS
from lightning_gemini.agent.messages import Plan, Stopped
from lightning_gemini.peers.errors import StaleGeneration
from lightning_gemini.recovery.engine import Engine, patience_s
from lightning_gemini.recovery.signals import Rewind
from lightning_gemini.rendezvous.link import Link
from lightning_gemini.rendezvous.world import Mode
from lightning_gemini.snapshot.slots import CorruptSnapshot
from lightning_gemini.state.local import Boundary


class Landing:
    """One attempt to get in."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.plan: Plan | None = None
        self.boundary: Boundary | None = None

    def answer(self) -> None:
        """In the listening thread, at a new generation: this rank has nothing to stop."""
        self.link.send(Stopped(generation=self.link.announced, step=-1, wrote=False, in_step=False, unwinding=True, counters={}))

    def position(self, engine: Engine) -> None:
        """Wait for the plan, choose the boundary, make loops and loaders enter there."""
        self.plan = self._next_plan(engine)
        self.boundary = self._choose(engine, self.plan)
        engine.local.position(self.boundary)

    def _next_plan(self, engine: Engine) -> Plan:
        while True:
            try:
                return self.link.wait_for_plan(self.link.announced, patience_s(engine.config))
            except StaleGeneration:
                continue

    def _choose(self, engine: Engine, plan: Plan) -> Boundary:
        memory = engine.memory
        if plan.rewind:
            return engine.local.decode(memory.local_in_arena(plan.target))
        slot = memory.ledger.find(plan.target)
        assert slot is not None, "the plan counts on this rank's local state"
        return engine.local.decode(memory.ledger.read(slot))

    def land(self, engine: Engine) -> Boundary:
        """Restore and join; returns the boundary."""
        assert self.plan is not None and self.boundary is not None
        while True:
            try:
                self._restore(engine, self.plan, self.boundary)
                return self.boundary
            except StaleGeneration:
                self._take(engine, self._next_plan(engine))
            except (CorruptSnapshot, TimeoutError, RuntimeError) as failure:
                if self.link.announced == self.plan.generation:
                    engine.world.enter(self.plan.generation)
                    engine.report(failure, "recovery")
                    self.link.wait_for_generation_after(self.plan.generation, engine.config.recovery.regroup_timeout_s)
                self._take(engine, self._next_plan(engine))

    def _take(self, engine: Engine, plan: Plan) -> None:
        boundary = self._choose(engine, plan)
        assert self.boundary is not None
        if (boundary.kind, boundary.step) != (self.boundary.kind, self.boundary.step):
            raise Rewind(f"the plan has changed to step {boundary.step}")
        self.plan, self.boundary = plan, boundary

    def _restore(self, engine: Engine, plan: Plan, boundary: Boundary) -> None:
        memory, world = engine.memory, engine.world
        memory.forget_after(plan.target)
        self._await_sources(engine, plan)
        memory.restore_tensors(plan.target)
        memory.captured = plan.target
        engine.adopt(boundary)
        if plan.rewind:
            memory.clear_log()
            memory.commit_local(memory.local_in_arena(plan.target), boundary.step, boundary.kind)
        memory.log.rotate(boundary.counters)
        world.counters = dict(boundary.counters)
        engine.host.reset_after_abort(own_fault=True, wrapper=boundary.wrapper)
        engine.host.set_gradients(boundary.grads)
        engine.local.restore(boundary)
        engine.join(plan)
        world.mode = Mode.BETWEEN

    def _await_sources(self, engine: Engine, plan: Plan) -> None:
        """Until the own shard is there (a donor may be writing it) and all living owners have theirs."""
        memory, deadline = engine.memory, time.monotonic() + engine.config.recovery.regroup_timeout_s
        others = (
            [rank for rank in range(self.link.world) if rank not in plan.replaced] if engine.host.replicated and not plan.rewind else []
        )
        while True:
            if self.link.announced != plan.generation:
                raise StaleGeneration(f"generation {plan.generation} is over")
            donated = all(memory.has(rank, plan.target) for rank in ([*plan.replaced] if engine.host.replicated else [memory.rank]))
            if donated and all(memory.reached(TENSORS, rank, plan.generation, plan.target) for rank in others):
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"the shards of step {plan.target} did not arrive")
            time.sleep(0.001)
