"""The persistent tier, as a node's agent sees it: when its storage process writes, what holds captures back, when a checkpoint is complete.

Seam: `configure` once the options are known, `due` when a rank says that a step is to be persisted, `look` after any news of the ranks;
`where_to_begin` and `fill` for a job, or a recovery, that goes on from storage. A file system is touched by the storage process only.

States: off; idle -> copying (the slots must not be overwritten: `held`) -> writing -> idle. Every node writes its part; the vote tells the
node at index 0 when all have (`written`), and it has the checkpoint completed. One attempt per generation and step, in a folder of its own.

Failure of any part: the node says so, that step has no checkpoint, what is older stays, the next due step is the next attempt. A storage
process that dies is started again then. Ranks wait for it in one case only: for where to begin, before the first step, or before a node
that comes into a job later first reports what there is.
"""

from __future__ import annotations

import functools
import re
import selectors
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from lightning_gemini.agent.memory import TENSORS, reached, step_of, tag
from lightning_gemini.config import PersistentConfig
from lightning_gemini.snapshot.slots import SlotFile
from lightning_gemini.storage import messages
from lightning_gemini.storage.layout import directory
from lightning_gemini.storage.messages import Answer, Message, Place
from lightning_gemini.storage.process import StorageProcess

if TYPE_CHECKING:
    from lightning_gemini.agent.node import Node

_LAST_S = 120.0
"""For how long the end of a job waits for its last checkpoint."""
Then = Callable[[Answer], None]


class Persisting:
    """See the module's docstring. Lives in the agent's thread."""

    def __init__(self, node: Node, selector: selectors.BaseSelector) -> None:
        self._node, self._selector = node, selector
        self._config = PersistentConfig()
        self._process: StorageProcess | None = None
        self._waiting: dict[int, Then] = {}
        """Request -> what its answers lead to."""
        self._number = 0
        self._due: dict[int, dict[int, Place]] = {}
        """Step -> rank -> what this node writes of it."""
        self._begin: messages.Opened | None = None
        self._asking: list[Callable[[messages.Opened], None]] = []
        self.held = -1
        """The step that is being copied, -1 for none: no capture may overwrite it."""
        self.written = 0
        """`tag` of the newest step of which this node has written its part."""
        self._committing = self._completed = 0
        self._finishing: Callable[[], None] | None = None
        self._deadline = 0.0
        self.newest: tuple[int, str] = (-1, "")
        """Step and path of the newest complete checkpoint that this node knows."""

    @property
    def on(self) -> bool:
        """Whether anything is persisted."""
        return bool(self._config.url)

    @property
    def known(self) -> bool:
        """Whether it is known what there is to begin from."""
        return not self.on or self._begin is not None

    def configure(self, config: PersistentConfig) -> None:
        """The options; asks where to begin."""
        self._config = config
        if self.on:
            self._ask(messages.Open(id=0, url=config.url, resume=config.resume), self._on_opened)

    # ---- the storage process

    def _ask(self, request: Message, then: Then) -> None:
        process = self._process or self._start()
        self._number += 1
        request.id = self._number
        self._waiting[request.id] = then
        try:
            process.send(request)
        except OSError as error:
            self._answer(messages.Failed(id=request.id, error=f"the storage process is gone: {error}"))

    def _start(self) -> StorageProcess:
        files, crew = self._node.coordinator.files, self._node.crew
        self._process = process = StorageProcess.start(
            self._node.storage_spawner, arenas=files.arenas, description=files.description, drop=crew.own_descriptors()
        )
        crew.private = [process.channel.fileno(), process.child.pidfd]
        self._selector.register(process.channel, selectors.EVENT_READ, self._on_answer)
        return process

    def _on_answer(self) -> None:
        assert self._process is not None
        try:
            answer = self._process.receive()
        except BlockingIOError:
            return
        if answer is not None:
            self._answer(answer)
            return
        status = self._stop()
        for number in list(self._waiting):
            self._answer(messages.Failed(id=number, error=f"the storage process has ended (exit status {status})"))

    def _answer(self, answer: Answer) -> None:
        then = self._waiting.get(answer.id)
        if not isinstance(answer, messages.Copied):
            self._waiting.pop(answer.id, None)
        if then is not None:
            then(answer)
        self.look()
        self.tick()

    def _stop(self) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        self._node.crew.private = []
        self._selector.unregister(process.channel)
        return process.close()

    # ---- the end

    def finish(self, then: Callable[[], None]) -> None:
        """All ranks of this node are done: call `then` when what they left to persist is complete, or has taken too long."""
        self._finishing, self._deadline = then, time.monotonic() + _LAST_S
        self.look()
        self.tick()

    def tick(self) -> None:
        """Due now and then, and after every answer."""
        then = self._finishing
        if then is None or (self._unfinished() and time.monotonic() < self._deadline):
            return
        self._finishing = None
        then()

    def _unfinished(self) -> bool:
        completes = self._node.coordinator.index == 0 or self._node.ending_since is not None  # else the job ends when all nodes have
        return self._busy() or (completes and self.written > self._completed)

    def reopen(self) -> None:
        """The node's memory is new."""
        self._waiting.clear()
        self._due.clear()
        self.held, self.written = -1, 0
        self._stop()

    def close(self) -> None:
        """End the storage process; what it writes has a few seconds to be finished."""
        self._waiting.clear()
        self._stop()

    # ---- where to begin

    def _on_opened(self, answer: Answer) -> None:
        if not isinstance(answer, messages.Opened):
            why = answer.error if isinstance(answer, messages.Failed) else repr(answer)
            self._node.end(1, why if why.startswith("persistent.") else f"persistent.url={self._config.url!r} cannot be used: {why}")
            return
        self._begin = answer
        if answer.path:
            self.newest = max(self.newest, (answer.step, answer.path))
        self._node.fill()
        for asking in self._asking:
            asking(answer)
        self._asking.clear()

    def where_to_begin(self, told: Callable[[messages.Opened], None]) -> None:
        """Calls `told` as soon as it is known."""
        if self._begin is not None:
            told(self._begin)
        else:
            self._asking.append(told)

    def fill(self, path: str, done: Callable[[str], None]) -> None:
        """Put a checkpoint into the arenas of this node's ranks, then call `done` with what went wrong, empty for nothing."""
        coordinator = self._node.coordinator
        places = [Place(arena=coordinator.place(rank), rank=rank) for rank in coordinator.own_ranks()]
        self._ask(
            messages.Fill(id=0, path=path, places=places),
            lambda answer: done(answer.error if isinstance(answer, messages.Failed) else ""),
        )

    # ---- writing

    def due(self, rank: int, step: int, position: int, count: int) -> None:
        """A rank of this node has passed the boundary of a step that is to be persisted."""
        place = Place(arena=self._node.coordinator.place(rank), rank=rank, position=position, count=count)
        self._due.setdefault(step, {})[rank] = place
        self.look()

    def look(self) -> None:
        """Begin, if a due step is complete in this node's memory and nothing is under way."""
        coordinator = self._node.coordinator
        if not self._due or coordinator.recovery is not None or self.held >= 0 or self._busy():
            return
        step, places = max(self._due.items())
        captured = coordinator.board.least(TENSORS)
        if len(places) == coordinator.ranks_per_node and reached(captured, coordinator.number, step):
            self._due.clear()
            if all(map(functools.partial(_has, step), coordinator.files.arenas)):
                self._persist(step, [places[rank] for rank in sorted(places)])
            else:
                coordinator.emit("persist_skipped", step=step)
                self._node.say(
                    f"step {step} is not persisted, storage is behind: raise persistent.every_n_steps={self._config.every_n_steps}"
                )

    def _busy(self) -> bool:
        return bool(self._waiting)

    def path(self, word: int) -> str:
        """Of the attempt to persist the generation and step in `word`."""
        job = re.sub(r"[^A-Za-z0-9_-]", "-", self._node.job.name)
        generation = word - tag(0, step_of(word))
        return f"{self._config.url.rstrip('/')}/{directory(step_of(word), f'{job}-{generation >> 40}')}"

    def _persist(self, step: int, places: list[Place]) -> None:
        coordinator = self._node.coordinator
        word = tag(coordinator.number, step)
        self._hold(step)

        def answered(answer: Answer) -> None:
            self._hold(-1)
            if isinstance(answer, messages.Written):
                coordinator.emit("persisted", step=step, bytes=answer.bytes, seconds=answer.seconds)
                self.written = word
                coordinator.on_written(word)
            elif isinstance(answer, messages.Failed):
                coordinator.emit("persist_failed", step=step, reason=answer.error)
                self._node.say(f"step {step} was not persisted, the last checkpoint is step {self.newest[0]}: {answer.error}")

        request = messages.Persist(id=0, path=self.path(word), step=step, node=coordinator.index or 0, places=places)
        self._ask(request, answered)

    def _hold(self, step: int) -> None:
        self.held = step
        self._node.coordinator.hold(step)

    # ---- completing

    def all_have_written(self, word: int) -> None:
        """On the node at index 0: every node has written its part of the step in `word`."""
        if word <= self._committing or step_of(word) < 0:
            return
        self._committing = word
        coordinator, step, path = self._node.coordinator, step_of(word), self.path(word)

        def answered(answer: Answer) -> None:
            if isinstance(answer, messages.Committed):
                if answer.warning:
                    self._node.say(answer.warning)
                coordinator.emit("checkpoint", step=step, path=path, removed=answer.removed)
                coordinator.on_complete(word)
            elif isinstance(answer, messages.Failed):
                self._completed = word  # it never will be
                coordinator.emit("persist_failed", step=step, reason=answer.error)
                self._node.say(f"the checkpoint of step {step} could not be completed: {answer.error}")

        self._ask(
            messages.Commit(
                id=0,
                path=path,
                step=step,
                nodes=list(range(len(coordinator.generation.roster))),
                keep_last=self._config.keep_last,
                keep_every_n_steps=self._config.keep_every_n_steps,
                replicated=coordinator.replicated,
            ),
            answered,
        )

    def complete(self, word: int) -> None:
        """A checkpoint of this job is complete."""
        if word:
            self._completed = max(self._completed, word)
            self.newest = max(self.newest, (step_of(word), self.path(word)))


def _has(step: int, arena: int) -> bool:
    """Whether the snapshot of a step is in an arena still."""
    file = SlotFile(arena)
    try:
        return file.find(step) is not None
    finally:
        file.close()
