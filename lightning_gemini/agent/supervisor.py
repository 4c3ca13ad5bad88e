"""The agent's event loop: starts and watches the processes of a node, serves their messages, and runs the coordinator.

Seam: `Supervisor(spawner, ranks_per_node, …).run() -> exit status`, which is the job's. Single-threaded over a selector: control channels,
pidfds (a death is an event of the kernel, not a timeout), a signal pipe, the membership, a tick of half a second for heartbeats and
deadlines.

What happens when a process ends: a rank inside `fit` -> recovery; a rank with exit status 0 elsewhere -> it is done; a rank that exits
with an error outside `fit` -> the script's own failure, the job ends with its status; a spare -> replaced by a new one.
SIGTERM and SIGINT end the job in Lightning's own way, all ranks after the same step, within `_GRACE_S`; then storage has its time.
A node that is expelled ends its processes at once; `run` then returns None, and whoever called it may offer the node again.
"""

from __future__ import annotations

import contextlib
import selectors
import signal
import time

import msgspec

from lightning_gemini.agent.crew import MAX_SPARE_FAILURES, Crew
from lightning_gemini.agent.job import Join, alone
from lightning_gemini.agent.member import Member
from lightning_gemini.agent.memory import BOUNDARY, HEARTBEAT_NS, step_of
from lightning_gemini.agent.messages import (
    Due,
    Fault,
    FromRank,
    Hello,
    Left,
    LoaderStarted,
    Progress,
    Stopped,
    Voted,
    Waiting,
    decode_from_rank,
)
from lightning_gemini.agent.node import Node
from lightning_gemini.agent.signals import Signals
from lightning_gemini.agent.spawn import Spawner
from lightning_gemini.config import GeminiConfig, parse
from lightning_gemini.telemetry.events import EventLog

_TICK_S = 0.5
_GRACE_S = 30.0
_STOPPED_AFTER_S = 1.0


class Supervisor:
    """One node's agent, of `ranks_per_node` ranks. `join` says how it becomes a member; by default it is the only node."""

    def __init__(self, spawner: Spawner, ranks_per_node: int, join: Join = alone, storage: Spawner | None = None) -> None:
        self.ranks_per_node = ranks_per_node
        self.selector = selectors.DefaultSelector()
        self.crew = Crew(spawner, self.selector)
        self.crew.on_message, self.crew.on_exit = self._on_message, self._on_exit
        self.node = Node(self.crew, ranks_per_node, self.selector, storage)
        self._terminating: signal.Signals | None = None
        self.signals = Signals(self._terminate)
        try:
            self.node.job = join(self.node, self.selector)
        except BaseException:
            self._close()
            raise

    # ---- the loop

    def run(self) -> int | None:
        """Run the job to its end; returns its exit status, None when this node was expelled. Leaves no process behind."""
        self.selector.register(self.signals, selectors.EVENT_READ, self.signals.take)
        self.selector.register(self.node.coordinator.membership, selectors.EVENT_READ, self.node.coordinator.membership.poll)
        try:
            while self.node.exit_status is None and not self.node.expelled:
                for key, _ in self.selector.select(_TICK_S):
                    key.data()
                self._tick()
            return self.node.exit_status
        finally:
            self._close()

    def _close(self) -> None:
        self.crew.end_all()
        self.node.persisting.close()
        coordinator = self.node.coordinator
        if hasattr(coordinator, "membership"):
            coordinator.membership.close()
        coordinator.close()
        self.signals.close()
        self.selector.close()

    def _terminate(self, number: signal.Signals) -> None:
        """All ranks end after the same step, which no rank can have passed yet; those outside of `fit` get the signal itself."""
        if self._terminating is None:
            self._terminating, self.node.ending_since = number, self.node.ending_since or time.monotonic()
        board = self.node.coordinator.board
        last = max(step_of(board.get(place, BOUNDARY)) for place in range(self.ranks_per_node)) + 2
        for member in self.crew.living():
            if member.rank is None:
                member.child.kill()
            elif not member.in_fit or last <= 1:
                signal.pidfd_send_signal(member.child.pidfd, number)
        if not self.node.coordinator.ask_to_end():
            self.node.end_after(last)

    def _tick(self) -> None:
        now = time.monotonic()
        since = self.node.ending_since
        if since is not None and now - since > _GRACE_S and self.crew.ranks():
            self.node.end(128 + (self._terminating or signal.SIGTERM), f"the ranks did not end within {_GRACE_S:g} s of the signal")
        for rank, member in self.crew.ranks().items():
            self._look_at(rank, member, now)
        self.node.persisting.tick()
        recovery = self.node.coordinator.recovery
        if now > self.node.deadline and recovery is not None and not recovery.stopped_ns:
            self._on_deadline()

    def _look_at(self, rank: int, member: Member, now: float) -> None:
        silent_s = now - self.node.coordinator.board.get(self.node.coordinator.place(rank), HEARTBEAT_NS) / 1e9
        if not member.in_fit or silent_s >= now:
            return
        stopped = silent_s > _STOPPED_AFTER_S and member.child.is_stopped()
        if stopped or silent_s > self.node.config.recovery.heartbeat_timeout_s:
            self.node.say(f"rank {rank} (pid {member.child.pid}) is {'stopped' if stopped else f'silent for {silent_s:.0f} s'}: replaced")
            member.child.kill()

    def _on_deadline(self) -> None:
        late = [m for m in self.crew.ranks().values() if m.stopped is None and not m.fresh]
        if not late:
            config = self.node.config
            url = f"persistent.url={config.persistent.url!r} did not answer"
            what = "no spare became ready" if self.node.persisting.known else url
            self.node.end(1, f"{what} within recovery.regroup_timeout_s={config.recovery.regroup_timeout_s:g}")
        for member in late:
            self.node.say(f"{member.name} did not stand still within recovery.regroup_timeout_s: replaced")
            member.child.kill()
        self.node.deadline = time.monotonic() + self.node.config.recovery.regroup_timeout_s

    # ---- processes

    def _on_exit(self, member: Member) -> None:
        if member.ended:  # by a restart, after the selector had reported it
            return
        while self._on_message(member):  # its last words first
            pass
        self.crew.forget(member)
        code = member.child.reap()
        if self.node.exit_status is not None:
            return
        if member.rank is None:
            self._on_spare_exit(member, code)
        elif code == 0 and (member.left or not member.in_fit):
            member.left = True
            if len(self.crew.done()) == self.ranks_per_node:
                self.node.persisting.finish(self.node.coordinator.membership.finished)
            else:
                self._on_last_after_signal()
        elif self.node.ending_since is not None:
            self._on_last_after_signal()
        elif code > 0 and (member.left or not member.in_fit):
            self.node.end(code, f"rank {member.rank} (pid {member.child.pid}) ended with exit status {code} outside of fit")
        elif any(other is not member for other in self.crew.done()):
            self.node.end(1, f"rank {member.rank} died (exit status {code}) when other ranks had finished already")
        else:
            self.crew.members.remove(member)
            what = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            self.node.fault(member, f"rank {member.rank} (pid {member.child.pid}) died: {what}")

    def _on_last_after_signal(self) -> None:
        if self.node.ending_since is not None and not self.crew.ranks():
            self.node.persisting.finish(self._end_after_signal)

    def _end_after_signal(self) -> None:
        path = self.node.persisting.newest[1]
        where = f", the newest checkpoint is {path}" if path else ""
        self.node.end(128 + (self._terminating or signal.SIGTERM), f"ended by signal{where}")

    def _on_spare_exit(self, member: Member, code: int) -> None:
        self.crew.members.remove(member)
        if not member.waiting:
            self.crew.spare_failures += 1
            if self.crew.spare_failures == MAX_SPARE_FAILURES:
                self.node.say(
                    f"{MAX_SPARE_FAILURES} spares in a row ended (last exit status {code}) before they were ready; no more are started"
                )
        self.node.start_spares()

    # ---- messages

    def _on_message(self, member: Member) -> bool:
        if member.ended:
            return False
        try:
            data = member.channel.receive(wait=False)
        except BlockingIOError:
            return False
        if data is None:
            with contextlib.suppress(KeyError):
                self.selector.unregister(member.channel)
            return False
        try:
            message = decode_from_rank(data)
        except msgspec.DecodeError as error:
            self.node.say(f"{member.name} (pid {member.child.pid}) sent a message that cannot be read ({error}): replaced")
            member.child.kill()
            return False
        self._handle(member, message)
        return True

    def _handle(self, member: Member, message: FromRank) -> None:
        match message:
            case Voted():
                self.node.coordinator.on_voted()
                self.node.persisting.look()
            case Due():
                assert member.rank is not None
                self.node.persisting.due(member.rank, message.step, message.position, message.count)
            case Hello():
                self._on_hello(member, message)
            case Waiting():
                member.waiting, self.crew.spare_failures = True, 0
                took_s = (time.monotonic_ns() - member.started_ns) / 1e9
                self.node.coordinator.emit("spare_ready", spare_pid=member.child.pid, seconds=took_s)
                self.node.fill()
            case Fault():
                self._on_fault(member, message)
            case Stopped():
                if message.generation == self.node.coordinator.number:
                    member.stopped = message
                    self.node.fill()
            case Progress():
                assert member.rank is not None
                self.node.coordinator.progress(member.rank, message)
            case LoaderStarted():
                self.crew.loaders.add(message.pid)
                self.node.coordinator.emit("loader_started", rank=member.rank, loader_pid=message.pid)
            case Left():
                member.left, member.in_fit = True, False

    def _on_hello(self, member: Member, message: Hello) -> None:
        if message.pid != member.child.pid:
            self.node.end(1, f"trainer.fit was called in process {message.pid}, a child that the script forked from {member.child.pid}: "
                         "call fit in the script's main process")  # fmt: skip
            return
        member.in_fit, member.left = member.rank is not None, False
        if not self.node.configured:
            self._configure(message)
        if self.node.persisting.on and member.rank is not None:
            self.node.begin_in(member, message.given, message.given_step)

    def _configure(self, message: Hello) -> None:
        self.node.configured = True
        coordinator = self.node.coordinator
        replicated = bool(message.config.pop("replicated", True))
        coordinator.configure(parse(GeminiConfig, message.config), replicated=replicated)
        coordinator.events = EventLog(message.directory, self.node.job.log_name, self.node.job.name)
        self.node.coordinator.emit("start", world=coordinator.world, spares=self.node.config.recovery.spares)
        if coordinator.others is not None and coordinator.index == 0 and coordinator.config.telemetry.banner:
            for line in coordinator.others.describe():
                self.node.say(line)
        self.node.persisting.configure(coordinator.config.persistent)
        self.node.start_spares()

    def _on_fault(self, member: Member, message: Fault) -> None:
        if not message.recoverable:
            self.node.end(1, f"{member.name} failed in {message.where}:\n{message.error}")
        elif message.generation == self.node.coordinator.number:
            self.node.fault(member, f"rank {member.rank} raised in {message.where}: {message.error.strip().splitlines()[-1]}", message)
        else:
            self.node.coordinator.emit("fault_in_recovery", rank=member.rank, where=message.where, error=message.error)
