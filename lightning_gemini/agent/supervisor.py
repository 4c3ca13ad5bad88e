"""The agent's event loop: starts and watches the processes of a node, serves their rendezvous, runs the coordinator.

Seam: `Supervisor(spawner, world).run() -> exit status`, which is the job's. Single-threaded over a selector: control channels, pidfds
(a death is an event of the kernel, not a timeout), a signal pipe, a tick of half a second for heartbeats and deadlines.

What happens when a process ends: a rank inside `fit` -> recovery; a rank with exit status 0 elsewhere -> it is done; a rank that exits
with an error outside `fit` -> the script's own failure, the job ends with its status; a spare -> replaced by a new one.
SIGTERM and SIGINT end the job in Lightning's own way, all ranks after the same step, within `_GRACE_S`.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable

import msgspec

from lightning_gemini.agent.channel import Channel
from lightning_gemini.agent.coordinator import Coordinator
from lightning_gemini.agent.loaders import Loaders
from lightning_gemini.agent.member import Member
from lightning_gemini.agent.memory import BOUNDARY, END_AT, HEARTBEAT_NS, create_files, step_of
from lightning_gemini.agent.messages import (
    Fault,
    FromRank,
    Hello,
    Left,
    LoaderStarted,
    Progress,
    Stop,
    Stopped,
    Waiting,
    decode_from_rank,
)
from lightning_gemini.agent.spawn import Spawner
from lightning_gemini.config import GeminiConfig, parse
from lightning_gemini.telemetry.events import EventLog

_TICK_S = 0.5
_GRACE_S = 30.0
_STOPPED_AFTER_S = 1.0
_MAX_SPARE_FAILURES = 3


class Supervisor:
    """One node's agent. `world` ranks, all on this node."""

    def __init__(self, spawner: Spawner, world: int) -> None:
        self.spawner, self.world = spawner, world
        self.config = GeminiConfig()
        self.replicated = True
        self.members: list[Member] = []
        self.loaders = Loaders()
        self.selector = selectors.DefaultSelector()
        self.exit_status: int | None = None
        self.job = f"{os.getpid()}-{time.time_ns()}"
        """Names this job in the event files."""
        self._configured = False
        self._spare_failures = 0
        self._terminating: signal.Signals | None = None
        self._terminating_since: float | None = None
        self._wait_deadline = float("inf")
        self._open()

    def _open(self) -> None:
        self.files = create_files(self.world)
        self.coordinator = Coordinator(
            self.world, self.files, replicated=lambda: self.replicated, max_faults_per_step=lambda: self.config.recovery.max_faults_per_step
        )

    # ---- the loop

    def run(self) -> int:
        """Run the job to its end; returns its exit status. Leaves no process behind."""
        wake, previous = self._catch_signals()
        try:
            for rank in range(self.world):
                self._start(rank)
            while self.exit_status is None:
                for key, _ in self.selector.select(_TICK_S):
                    key.data()
                self._tick()
            return self.exit_status
        finally:
            self._end_all()
            signal.set_wakeup_fd(-1)
            for number, handler in previous.items():
                signal.signal(number, handler)
            wake.close()
            self._wake_writer.close()
            self.selector.close()
            self.coordinator.board.close()
            self.files.close()
            if self.coordinator.events is not None:
                self.coordinator.events.close()

    def _catch_signals(self) -> tuple[socket.socket, dict[signal.Signals, signal._HANDLER]]:
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self._wake_writer = writer
        previous = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)}
        self._listen(reader, lambda: self._on_signal(reader))
        return reader, previous

    def _on_signal(self, reader: socket.socket) -> None:
        for number in reader.recv(64):
            if number in (signal.SIGTERM, signal.SIGINT):
                self._terminate(signal.Signals(number))

    def _terminate(self, number: signal.Signals) -> None:
        """All ranks end after the same step, which no rank can have passed yet; those outside of `fit` get the signal itself."""
        if self._terminating is None:
            self._terminating, self._terminating_since = number, time.monotonic()
        board = self.coordinator.board
        last = max(step_of(board.get(rank, BOUNDARY)) for rank in range(self.world)) + 2
        for member in list(self.members):
            if member.ended:
                continue
            if member.rank is None:
                member.child.kill()
            elif member.in_fit and last > 1:
                board.set(member.rank, END_AT, last)
            else:
                signal.pidfd_send_signal(member.child.pidfd, number)

    def _listen(self, file: socket.socket | Channel | int, callback: Callable[[], object]) -> None:
        self.selector.register(file, selectors.EVENT_READ, callback)

    def _tick(self) -> None:
        now = time.monotonic()
        if self._terminating_since is not None and now - self._terminating_since > _GRACE_S:
            self._end(128 + (self._terminating or signal.SIGTERM), f"the ranks did not end within {_GRACE_S:g} s of the signal")
        for rank, member in self._ranks().items():
            silent_s = now - self.coordinator.board.get(rank, HEARTBEAT_NS) / 1e9
            if member.in_fit and silent_s < now and not member.ended:
                stopped = silent_s > _STOPPED_AFTER_S and member.child.is_stopped()
                if stopped or silent_s > self.config.recovery.heartbeat_timeout_s:
                    self._say(
                        f"rank {rank} (pid {member.child.pid}) is {'stopped' if stopped else f'silent for {silent_s:.0f} s'}: replaced"
                    )
                    member.child.kill()
        if now > self._wait_deadline and self.coordinator.recovery is not None and self.coordinator.recovery.plan is None:
            self._on_deadline()

    def _on_deadline(self) -> None:
        late = [m for m in self._ranks().values() if m.stopped is None and not m.fresh]
        if not late:
            self._end(1, f"no spare became ready within recovery.regroup_timeout_s={self.config.recovery.regroup_timeout_s:g}")
        for member in late:
            self._say(f"{member.name} did not stand still within recovery.regroup_timeout_s: replaced")
            member.child.kill()
        self._wait_deadline = time.monotonic() + self.config.recovery.regroup_timeout_s

    # ---- processes

    def _ranks(self) -> dict[int, Member]:
        return {member.rank: member for member in self.members if member.rank is not None and not member.ended}

    def _start(self, rank: int | None) -> None:
        channel, theirs = Channel.pair()
        environment = {
            "LIGHTNING_GEMINI_CHANNEL": str(theirs.fileno()),
            "LIGHTNING_GEMINI_FILES": self.files.to_text(),
            "LIGHTNING_GEMINI_WORLD": str(self.world),
            "LIGHTNING_GEMINI_RANK": "" if rank is None else str(rank),
            "LIGHTNING_GEMINI_JOB": self.job,
            "LIGHTNING_GEMINI_GENERATION": str(self.coordinator.generation),
        }
        try:
            child = self.spawner.spawn(environment, [theirs.fileno(), *self.files.all()], self._own_descriptors(channel))
        finally:
            theirs.close()
        member = Member(child, channel, rank, time.monotonic_ns())
        self.members.append(member)
        self._listen(channel, lambda: self._on_message(member))
        self._listen(child.pidfd, lambda: self._on_exit(member))

    def _own_descriptors(self, new: Channel) -> list[int]:
        alive = [m for m in self.members if not m.ended]
        return [new.fileno(), *self.loaders.descriptors(), *(m.channel.fileno() for m in alive), *(m.child.pidfd for m in alive)]

    def _start_spares(self) -> None:
        if self._terminating_since is not None or self._spare_failures >= _MAX_SPARE_FAILURES:
            return
        idle = sum(member.rank is None and not member.ended for member in self.members)
        vacant = self.world - len(self._ranks()) - sum(m.ended and m.left and m.rank is not None for m in self.members)
        wanted = max(self.config.recovery.spares, vacant if self.coordinator.recovery else 0)
        for _ in range(wanted - idle):
            self._start(None)

    def _on_exit(self, member: Member) -> None:
        if member.ended:  # by a restart, after the selector had reported it
            return
        while self._on_message(member):  # its last words first
            pass
        self._forget(member)
        code = member.child.reap()
        if self.exit_status is not None:
            return
        if member.rank is None:
            self._on_spare_exit(member, code)
        elif code == 0 and (member.left or not member.in_fit):
            member.left = True
            if all(m.left and m.ended for m in self.members if m.rank is not None):
                self._end(0, "")
            elif self._terminating_since is not None and not self._ranks():
                self._end(128 + (self._terminating or signal.SIGTERM), "ended by signal")
        elif self._terminating_since is not None:
            if not self._ranks():
                self._end(128 + (self._terminating or signal.SIGTERM), "ended by signal")
        elif code > 0 and (member.left or not member.in_fit):
            self._end(code, f"rank {member.rank} (pid {member.child.pid}) ended with exit status {code} outside of fit")
        elif any(m.ended and m.left for m in self.members if m.rank is not None and m is not member):
            self._end(1, f"rank {member.rank} died (exit status {code}) when other ranks had finished already")
        else:
            self.members.remove(member)
            what = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            self._fault(member, f"rank {member.rank} (pid {member.child.pid}) died: {what}")

    def _on_spare_exit(self, member: Member, code: int) -> None:
        self.members.remove(member)
        if not member.waiting:
            self._spare_failures += 1
            if self._spare_failures == _MAX_SPARE_FAILURES:
                self._say(
                    f"{_MAX_SPARE_FAILURES} spares in a row ended (last exit status {code}) before they were ready; no more are started"
                )
        self._start_spares()

    def _forget(self, member: Member) -> None:
        """Before the descriptors are closed: epoll keeps an entry whose file a forked child still holds, and would report it under the
        number's next owner."""
        member.ended = True
        for file in (member.channel, member.child.pidfd):
            with contextlib.suppress(KeyError, ValueError):
                self.selector.unregister(file)
        member.channel.close()

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
            self._say(f"{member.name} (pid {member.child.pid}) sent a message that cannot be read ({error}): replaced")
            member.child.kill()
            return False
        self._handle(member, message)
        return True

    def _handle(self, member: Member, message: FromRank) -> None:
        match message:
            case Hello():
                self._on_hello(member, message)
            case Waiting():
                member.waiting, self._spare_failures = True, 0
                self._event("spare_ready", spare_pid=member.child.pid, seconds=(time.monotonic_ns() - member.started_ns) / 1e9)
                self._fill()
            case Fault():
                self._on_fault(member, message)
            case Stopped():
                if message.generation == self.coordinator.generation:
                    member.stopped = message
                    self._fill()
            case Progress():
                self._on_progress(member, message)
            case LoaderStarted():
                self.loaders.add(message.pid)
                self._event("loader_started", rank=member.rank, loader_pid=message.pid)
            case Left():
                member.left, member.in_fit = True, False

    def _on_hello(self, member: Member, message: Hello) -> None:
        if message.pid != member.child.pid:
            self._end(1, f"trainer.fit was called in process {message.pid}, a child that the script forked from {member.child.pid}: "
                         "call fit in the script's main process")  # fmt: skip
            return
        member.in_fit, member.left = member.rank is not None, False
        if self._configured:
            return
        self._configured = True
        replicated = bool(message.config.pop("replicated", True))
        self.config, self.replicated = parse(GeminiConfig, message.config), replicated
        self.coordinator.events = EventLog(message.directory, "agent", self.job)
        self._event("start", world=self.world, spares=self.config.recovery.spares)
        self._start_spares()

    def _on_fault(self, member: Member, message: Fault) -> None:
        if not message.recoverable:
            self._end(1, f"{member.name} failed in {message.where}:\n{message.error}")
        elif message.generation == self.coordinator.generation:
            self._fault(member, f"rank {member.rank} raised in {message.where}: {message.error.strip().splitlines()[-1]}", message)
        else:
            self._event("fault_in_recovery", rank=member.rank, where=message.where, error=message.error)

    def _on_progress(self, member: Member, message: Progress) -> None:
        assert member.rank is not None
        summary = self.coordinator.progress(member.rank, message)
        if summary is None:
            return
        total = sum(summary.seconds.values())
        phases = ", ".join(f"{phase} {seconds:.3f}" for phase, seconds in summary.seconds.items())
        self._say(f"recovered in {total:.3f} s at step {summary.step} ({phases}): {summary.reason}")
        for other in self._ranks().values():
            other.send(summary)
        self._spare_failures = 0
        self._start_spares()

    # ---- recovery

    def _fault(self, member: Member, reason: str, raised: Fault | None = None) -> None:
        assert member.rank is not None
        ending = self.coordinator.fault(member.rank, reason, self._ranks(), raised.at_ns if raised else 0)
        if ending is not None:
            what = f"{member.name} raised in {raised.where}:\n{raised.error}" if raised else reason
            self._end(1, f"{ending}; the last: {what}")
            return
        self._wait_deadline = time.monotonic() + self.config.recovery.regroup_timeout_s
        self._fill()

    def _fill(self) -> None:
        if self.coordinator.recovery is None:
            return
        if not self._configured:  # nobody has reached fit: there is nothing to keep
            self._restart()
            return
        ranks = self._ranks()
        for rank in sorted(set(range(self.world)) - set(ranks)):
            spare = next((m for m in self.members if m.rank is None and m.waiting and not m.ended), None)
            if spare is None:
                self._start_spares()
                return
            self.coordinator.assign(spare, rank)
        decided = self.coordinator.try_plan(self._ranks())
        if decided is not None and decided.action == "restart":
            if decided.repeated_steps:
                self._end(1, f"nothing to go back to: {decided.reason}, no older snapshot is complete; {decided.repeated_steps} completed "
                             "steps are lost, resume from your last checkpoint")  # fmt: skip
            else:
                self._restart()

    def _restart(self) -> None:
        self._say("a rank was lost before the first step boundary: all ranks start anew")
        self._end_all()
        generation, faults, events = self.coordinator.generation, self.coordinator._faults, self.coordinator.events
        self.members.clear()
        self.coordinator.board.close()
        self.files.close()
        self._open()
        self.coordinator.generation, self.coordinator._faults, self.coordinator.events = generation, faults, events
        for rank in range(self.world):
            self._start(rank)
        if self._configured:
            self._start_spares()

    def _end(self, status: int, reason: str) -> None:
        if self.exit_status is None:
            self.exit_status = status
            self._event("end", exit_status=status, reason=reason)
            if reason:
                self._say(reason)

    def _end_all(self) -> None:
        for member in self.members:
            if not member.ended:
                member.send(Stop(reason="the job has ended"))
                member.child.kill()
        for member in self.members:
            if not member.ended:
                self._forget(member)
                member.child.reap()
        self.loaders.end()

    def _event(self, event: str, **fields: object) -> None:
        if self.coordinator.events is not None:
            self.coordinator.events.emit(event, **fields)

    def _say(self, text: str) -> None:
        print(f"lightning_gemini: {text}", file=sys.stderr, flush=True)
