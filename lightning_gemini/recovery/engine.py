"""The engine of a rank: it runs each step so that it can be repeated, and takes its part in every recovery.

A step s, from inside the Strategy's hook:

    enter     commit the rank-local state (kind ENTRY): from here the step can be repeated.
    attempt   forward, backward, clipping; collectives absorb errors (`Mode.STEP`).
    gate      before the first write: no error so far, and *every* rank's tensors of the newest snapshot are committed. From here the live
              tensors are no source any more.
    write     the optimizer.
    leave     commit the rank-local state of s + 1 (kind EXIT), tensors now, or in the background where a rank of the same node holds
              them too, and wait until *every* rank has committed the boundary. So no rank is ever ahead of the step that all can return to.

A fault anywhere in there: stop, tell the agent where we stand, get the plan, put state back to the boundary where needed, join the new
generation, repeat the attempt. Between steps (`Mode.BETWEEN`) a failed collective calls `stand_still`, which does the same without any
state to put back, and the collective is tried again. A further generation that begins in any of these waits starts the procedure over.

What cannot be repeated raises: `Rewind` (re-enter `fit`), or the user's own exception once the agent has been told.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

from lightning_gemini.agent.memory import BOUNDARY, GATE, REPLICATED, TENSORS
from lightning_gemini.agent.messages import Fault, Plan, Progress, Stopped
from lightning_gemini.config import GeminiConfig
from lightning_gemini.peers.errors import StaleGeneration
from lightning_gemini.recovery import base
from lightning_gemini.recovery.memory import Memory
from lightning_gemini.recovery.signals import Rewind, StepFault
from lightning_gemini.rendezvous.link import Link
from lightning_gemini.rendezvous.world import Mode, World
from lightning_gemini.snapshot.collective_log import CollectiveLog
from lightning_gemini.snapshot.slots import CorruptSnapshot
from lightning_gemini.state.catalogue import Entry
from lightning_gemini.state.local import Boundary, Kind, LocalState

R = TypeVar("R")
_ANNOUNCEMENT_S = 5.0
"""How long a rank whose collective failed waits for the agent to announce why, before it reports the failure as its own. On several nodes
it may take as long as a node's registration lasts, and longer."""


class Host(Protocol):
    """What the engine needs of the strategy."""

    def give_up(self, error: BaseException) -> None:
        """Have the job end with this error."""
        ...

    def before_step(self) -> None:
        """Bring the model into the one state in which it is captured."""
        ...

    def gradients(self) -> list[torch.Tensor | None] | None:
        """Gradients accumulated before this step by earlier micro-batches, None when there are none to keep."""
        ...

    def set_gradients(self, gradients: list[torch.Tensor | None] | None) -> None:
        """Put them back; None clears."""
        ...

    def wrapper_state(self) -> dict[str, Any]:
        """State of the model's wrapper that decides how it adds and when it synchronizes."""
        ...

    def reset_after_abort(self, *, own_fault: bool, wrapper: dict[str, Any]) -> None:
        """Bring wrappers (DDP's reducer, FSDP2's hooks) back to their state between steps, which `wrapper` describes."""
        ...

    def form_groups(self) -> None:
        """Form the default group of the present generation."""
        ...


class Engine:
    """One per `fit`. Not thread-safe: it belongs to the main thread."""

    def __init__(self, world: World, link: Link, config: GeminiConfig, memory: Memory, local: LocalState, host: Host) -> None:
        self.world, self.link, self.config, self.memory, self.local, self.host = world, link, config, memory, local, host
        self.step = -1
        """The newest boundary all ranks have committed, and the step under way."""
        self.in_step = False
        self.wrote = False
        self.finished = False
        """`fit` has returned; what follows it, such as `test`, has no step that would tell that this rank has gone on."""
        self.resumed_generation = world.generation
        """Generation whose first step is complete on this rank."""
        self._announcement_s = announcement_s(link, config)
        self._committed = -1
        self._last_blob = b""

    # ---- boundaries

    def start(self, step: int) -> None:
        """The first boundary, in `on_train_start`."""
        self.step = step
        self.host.before_step()
        self.memory.begin()
        self.commit(Kind.START, step)
        mine = self.memory.prepare(step)
        if self._tensors_due(step):
            self.memory.commit_tensors(step, self._embedded(), mine)
        self._committed = step
        self.memory.publish(self.world.generation, step)

    def commit(self, kind: Kind, step: int, result: Any = None) -> Boundary:
        """Write the rank-local state and begin a new segment of the log of collectives."""
        return self._write(self._capture(kind, step, result))

    def _capture(self, kind: Kind, step: int, result: Any = None) -> Boundary:
        frozen = self.memory.review()
        boundary = Boundary(kind, step, dict(self.world.counters), self.host.wrapper_state(), result, self.host.gradients(), {}, frozen)
        self._last_blob = self.local.capture(boundary)
        return boundary

    def _write(self, boundary: Boundary) -> Boundary:
        self.memory.commit_local(self._last_blob, boundary.step, boundary.kind)
        self.memory.log.rotate(boundary.counters)
        return boundary

    def _embedded(self) -> bytes:
        """Rank-local state to keep beside tensors: needed to go back further than the ledger does."""
        return self._last_blob

    def _tensors_due(self, step: int) -> bool:
        every = self.config.snapshot.every_n_steps
        return bool(every and step % every == 0) or self.memory.persisted(step)

    def _may_capture(self) -> bool:
        """Whether the next boundary's tensors may overwrite the snapshot before the newest one. Not while that is being persisted. And on
        several nodes the newest snapshot must be replicated before the one before it is overwritten, or nothing might be left that all
        nodes can go back to. A slow network thus costs snapshots (or, with `replication.when_behind: wait`, time)."""
        generation, timeout_s = self.world.generation, self.config.recovery.collective_timeout_s
        if self.link.board.alone and not self.config.persistent.url:
            return True
        self.memory.wait_all(GATE, generation, self.step, timeout_s)
        if not self.link.board.alone and self.config.replication.when_behind == "wait":
            self.memory.wait_all(REPLICATED, generation, self.memory.captured, timeout_s)
            return True
        return self.memory.may_capture(generation)

    # ---- a step

    def run(self, attempt: Callable[[], R], result_of: Callable[[R], Any]) -> R:
        """Run `attempt` as step `self.step`, as often as it takes; `result_of` gives what a rank that lands after it must return."""
        self._enter()
        return self.repeat(attempt, result_of)

    def repeat(self, attempt: Callable[[], R], result_of: Callable[[R], Any]) -> R:
        """`run` from inside the step: also for a rank that has landed on entering it."""
        while True:
            try:
                out = self._attempt(attempt)
                self._leave(result_of(out))
                return out
            except Exception as error:
                self.world.mode = Mode.BETWEEN
                plan = self._recover(error)
                if plan.target > self.step:
                    self._done(plan.target)
                    return out
            finally:
                self.world.mode = Mode.BETWEEN
                self.in_step = False

    def _enter(self) -> None:
        self.host.before_step()
        boundary = self._capture(Kind.ENTRY, self.step)
        if self.memory.modified(self.step):  # by a callback: what was captured at the boundary is not what this step starts from
            self._recapture()
        self._write(boundary)

    def _attempt(self, attempt: Callable[[], R]) -> R:
        self.in_step, self.wrote, self.world.error = True, False, None
        self.world.mode = Mode.STEP
        self.check()
        out = attempt()
        self.gate()
        return out

    def check(self) -> None:
        """Raise `StepFault` if a collective of this step has failed or a recovery was announced."""
        if self.world.error is not None:
            raise StepFault(f"a collective of step {self.step} failed") from self.world.error
        if self.world.stale:
            raise StepFault(f"a recovery began in step {self.step}")

    def gate(self) -> None:
        """Called before the optimizer's first write of a step (see the module's docstring)."""
        self.check()
        if self.wrote or not self.in_step:
            return
        if not self.memory.settle():
            self._recapture()
        self.memory.wait_all(TENSORS, self.world.generation, self.memory.captured, self.config.recovery.collective_timeout_s)
        self.memory.at_gate(self.world.generation, self.step)
        self.wrote = True

    def _recapture(self) -> None:
        self.memory.settle()
        self.memory.commit_tensors(self.step, self._embedded())
        self.memory.publish(self.world.generation, self.step)

    def _leave(self, result: Any) -> None:
        self.world.mode = Mode.BETWEEN
        new = self.step + 1
        due = self._tensors_due(new) and self._may_capture()
        self.commit(Kind.EXIT, new, result)
        mine = self.memory.prepare(new)
        background = self.memory.may_drain(mine)
        if due and not background:
            self.memory.commit_tensors(new, self._embedded(), mine)
        self._committed = new
        self.memory.publish(self.world.generation, new)
        if due and background:
            self.memory.drain(new, self.world.generation, self._embedded(), mine)
        self.memory.wait_all(BOUNDARY, self.world.generation, new, self.config.recovery.collective_timeout_s)
        self._done(new)

    def _done(self, step: int) -> None:
        self.step = self._committed = step
        self.wrote = False
        self.report_resumed()

    def report_resumed(self) -> None:
        """Tell the agent, once per recovery, that this rank has gone on: it has completed a step, or `fit`."""
        if self.resumed_generation != self.world.generation:
            self.resumed_generation = self.world.generation
            self.link.send(Progress(generation=self.world.generation, phase="resumed", step=self.step))

    def adopt(self, boundary: Boundary) -> None:
        """This rank has landed at `boundary`: it goes on from there."""
        self.step = self._committed = boundary.step
        slot = self.memory.ledger.find(boundary.step)
        self._last_blob = self.memory.ledger.read(slot) if slot else b""
        self.in_step = self.wrote = False
        self.resumed_generation = -1

    def persist_due(self) -> bool:
        """Whether the present boundary is one that goes to persistent storage, and its tensors are in memory or on their way there."""
        return self.memory.persisted(self.step) and self.memory.capturing == self.step

    # ---- recovery

    def stand_still(self, error: BaseException | None) -> None:
        """Between steps, a collective failed or a recovery was announced: returns when this rank has joined the new generation."""
        self._recover(error)
        if self.finished:
            self.report_resumed()

    def _recover(self, error: BaseException | None) -> Plan:
        own = error is not None and self._is_own(error)
        if own and error is not None:
            self.report(error, "training step")
        if error is not None:  # its frames hold the aborted forward, and with it DDP's old reducer and its hooks
            error.__traceback__ = error.__context__ = error.__cause__ = None
        link, timeout_s = self.link, self.config.recovery.regroup_timeout_s
        if not own and not self.world.stale:
            try:
                link.wait(lambda: self.world.stale, self._announcement_s, "the agent's word on a failed collective")
            except TimeoutError:
                self.report(error or RuntimeError("a collective failed"), "a collective")
        link.wait(lambda: self.world.stale, timeout_s, "the agent to begin a recovery")
        while True:
            generation = link.announced
            try:
                return self._follow(generation, own_fault=own)
            except StaleGeneration:
                continue
            except (CorruptSnapshot, TimeoutError, RuntimeError, MemoryError) as failure:
                self.failed_in_recovery(failure, generation)

    def failed_in_recovery(self, failure: Exception, generation: int) -> None:
        """Returns when a newer generation has begun. What may be because of a further fault elsewhere is not reported before the agent
        had time to announce that: it would count twice."""
        link = self.link
        if not isinstance(failure, (CorruptSnapshot, MemoryError)):
            with contextlib.suppress(TimeoutError):
                link.wait_for_generation_after(generation, self._announcement_s)
        if link.announced == generation:
            self.world.enter(generation)
            self.report(failure, "recovery")
            link.wait_for_generation_after(generation, self.config.recovery.regroup_timeout_s)

    def _is_own(self, error: BaseException) -> bool:
        """Whether this rank's code raised, rather than a collective that failed because of others."""
        return not isinstance(error, (StepFault, StaleGeneration)) and self.world.error is None and self.in_step

    def report(self, error: BaseException, where: str, *, recoverable: bool = True) -> None:
        """Tell the agent of a fault of this rank."""
        text = "".join(traceback.format_exception(error))
        self.link.send(
            Fault(
                generation=self.world.generation,
                step=self.step,
                where=where,
                error=text[-8000:],
                recoverable=recoverable,
                at_ns=time.monotonic_ns(),
            )
        )

    def _follow(self, generation: int, *, own_fault: bool) -> Plan:
        settled = self.memory.settle()
        stopped = Stopped(
            generation=generation,
            step=self._committed,
            wrote=self.wrote and self._committed == self.step,
            in_step=self.in_step,
            unwinding=False,
            counters=dict(self.world.counters),
            at=self.step,
        )
        self.link.send(stopped)
        plan = self.link.wait_for_plan(generation, patience_s(self.config))
        if plan.rewind:
            raise Rewind(f"step {plan.target}")
        if self.in_step and plan.target == self.step:
            self._put_back(plan, own_fault=own_fault)
        if self.memory.captured < plan.target or not settled:
            self.memory.commit_tensors(plan.target, self._embedded())
        for rank, donor in plan.donors.items():
            if donor == self.memory.rank:
                self.memory.donate(rank, plan.target)
        self._committed = plan.target
        self.join(plan)
        return plan

    def _put_back(self, plan: Plan, *, own_fault: bool) -> None:
        """This step is repeated: state as it was on entering it."""
        slot = self.memory.ledger.find(plan.target)
        assert slot is not None
        entry = self.local.decode(self.memory.ledger.read(slot))
        self.memory.frozen.load(entry.frozen)
        if self.wrote:
            self._await_shards(plan)
            base.require_none(self.memory.restore_tensors(plan.target), self.host.give_up)
        self.memory.forget_after(plan.target)
        self.host.set_gradients(entry.grads)
        self.host.reset_after_abort(own_fault=own_fault, wrapper=entry.wrapper)
        self.local.restore(entry)
        self.memory.mark_frozen()
        self.wrote = False

    def _await_shards(self, plan: Plan) -> None:
        """Until the others, who have not written yet, have captured what this rank shall go back to, where nobody had a snapshot of it."""
        target, sharers, what = plan.target, self.memory.sharers(), f"the shards of step {plan.target} did not arrive"
        timeout_s = self.config.recovery.regroup_timeout_s
        self.memory.wait_until(lambda: all(self.memory.has(rank, target) for rank in sharers), plan.generation, timeout_s, what)

    def join(self, plan: Plan, lacking: list[Entry] | None = None) -> None:
        """Enter the generation of a plan: words, results to replay, groups. `lacking`: of a replaced rank, see `recovery.base`."""
        world = self.world
        self.link.send(Progress(generation=plan.generation, phase="restored"))
        world.enter(plan.generation, self.link.hosts)
        world.error = None
        self.memory.publish(plan.generation, plan.target)
        base.exchange(self.memory, world, plan, lacking, self.host.give_up)  # a replaced rank waits for what is published before it asks
        world.replay = self._replay(plan)
        self.host.form_groups()
        self.link.send(Progress(generation=plan.generation, phase="regrouped"))

    def _replay(self, plan: Plan) -> dict[tuple[str, int], bytes | None]:
        """Results of collectives that others have completed and this rank has not."""
        found: dict[tuple[str, int], bytes | None] = {}
        for group, (count, holder) in plan.logs.items():
            if self.world.counters.get(group, 0) < count:
                files = self.link.files
                log = CollectiveLog(files.logs[self.link.place(holder)] if self.link.is_here(holder) else files.others)
                wanted = range(self.world.counters.get(group, 0), count)
                found.update({key: data for key, data in log.results().items() if key[0] == group and key[1] in wanted})
                log.close()
        return found


def patience_s(config: GeminiConfig) -> float:
    """How long a rank waits for a plan: longer than the agent waits for ranks, which it kills one by one at its own deadline."""
    return 10 * config.recovery.regroup_timeout_s + 60


def announcement_s(link: Link, config: GeminiConfig) -> float:
    """How long a rank whose collective failed waits for the agent to announce why."""
    return _ANNOUNCEMENT_S + (0.0 if link.board.alone else 2 * config.membership.lease_ttl_s)
