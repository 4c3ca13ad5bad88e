"""The sending end: one thread for each peer, which the agent never waits for.

Seam: `request` says that the newest snapshot of a rank shall get there; `stop` and `join` end the thread. Lives for one generation.

States of a request: waiting -> under way -> acknowledged or failed. There is at most one of each rank in either state: a newer one replaces
the one that waits, so a slow peer is behind, but nothing piles up. A connection that breaks puts its request back, unless a newer one
waits, and is made again after a pause that doubles.

Failure: the peer has no memory, or bytes that do not match twice -> `on_failed`, not tried again. A newer generation over there -> the
thread ends.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import msgspec

from lightning_gemini.peers.errors import RendezvousError, StaleGeneration
from lightning_gemini.replication import messages
from lightning_gemini.replication.arenas import Held
from lightning_gemini.replication.transport import Lane
from lightning_gemini.snapshot import blocks
from lightning_gemini.snapshot.slots import CorruptSnapshot, Slot, SlotFile

FIRST_PAUSE_S, LAST_PAUSE_S = 0.05, 5.0
_ALLOCATE_S = 300.0
"""Limit of a peer's answer to an offer: it may have to take gigabytes of memory first."""
_REPLY_S = 60.0


class Request(NamedTuple):
    """A step that shall get there, and when that was asked for (`time.monotonic`)."""

    rank: int
    step: int
    since: float

    def age_s(self) -> float:
        """Seconds since it was asked for."""
        return time.monotonic() - self.since


class Reports(Protocol):
    """What becomes of requests."""

    def replicated(self, rank: int, step: int) -> None:
        """The peer has acknowledged it."""

    def failed(self, rank: int, step: int, why: str) -> None:
        """It is not tried again."""

    def news(self, text: str) -> None:
        """One line for the log."""


class _Failed(Exception):
    """This request failed, the connection is good."""


class Sender:
    """See the module's docstring. `connect` gives a proved lane, `leave` is told before it is closed."""

    def __init__(self, name: str, connect: Callable[[], Lane], leave: Callable[[Lane], None], held: Held, reports: Reports) -> None:
        self._name, self._connect, self._leave, self._held, self._reports = name, connect, leave, held, reports
        self._lane: Lane | None = None
        self._news = threading.Condition()
        self._waiting: dict[int, Request] = {}
        self._current: Request | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=f"lightning-gemini-send-{name}", daemon=True)
        self._thread.start()

    # ---- any thread

    def request(self, rank: int, step: int) -> None:
        """The newest snapshot of `rank`, of `step` or later, shall get there."""
        with self._news:
            known = self._waiting.get(rank)
            since = known.since if known is not None else time.monotonic()
            self._waiting[rank] = Request(rank, step, since)
            self._news.notify()

    def requests(self) -> list[Request]:
        """What is not there yet: by rank the newest step, with the time of the oldest request."""
        with self._news:
            found = dict(self._waiting)
            if (now := self._current) is not None:
                found[now.rank] = Request(now.rank, found.get(now.rank, now).step, now.since)
        return list(found.values())

    def forget_after(self, step: int) -> None:
        """A recovery went back."""
        with self._news:
            self._waiting = {rank: request for rank, request in self._waiting.items() if request.step <= step}

    def stop(self) -> None:
        """End the thread; the fence ends its connection."""
        with self._news:
            self._stopped = True
            self._waiting.clear()
            self._news.notify()

    def join(self, limit_s: float) -> bool:
        """Whether it has ended."""
        self._thread.join(limit_s)
        return not self._thread.is_alive()

    # ---- the sender's thread

    def _run(self) -> None:
        pause_s = FIRST_PAUSE_S
        try:
            while (request := self._next()) is not None:
                try:
                    self._attempt(request)
                    pause_s = FIRST_PAUSE_S
                except (OSError, RendezvousError, msgspec.DecodeError) as error:
                    self._lost(request, error, first=pause_s == FIRST_PAUSE_S)
                    self._pause(pause_s)
                    pause_s = min(2 * pause_s, LAST_PAUSE_S)
        finally:
            self._disconnect()

    def _next(self) -> Request | None:
        with self._news:
            self._current = None
            while not self._waiting and not self._stopped:
                self._news.wait()
            if self._stopped:
                return None
            self._current = self._waiting.pop(next(iter(self._waiting)))
            return self._current

    def _attempt(self, request: Request) -> None:
        if self._lane is None:
            self._lane = self._connect()
        try:
            step = self._transfer(self._lane, request)
        except (_Failed, CorruptSnapshot) as error:
            self._forget_current()
            self._reports.failed(request.rank, request.step, str(error))
        else:
            self._forget_current()  # first: whoever hears of it finds nothing behind
            self._reports.replicated(request.rank, step)

    def _forget_current(self) -> None:
        with self._news:
            self._current = None

    def _lost(self, request: Request, error: Exception, *, first: bool) -> None:
        self._disconnect()
        with self._news:
            if self._stopped:
                return
            if isinstance(error, StaleGeneration):
                self._stopped = True
            else:
                self._waiting.setdefault(request.rank, request)
        if first or self._stopped:
            self._reports.news(f"{self._name} gets no snapshots for now: {error}")

    def _pause(self, seconds: float) -> None:
        with self._news:
            self._news.wait_for(lambda: self._stopped, seconds)

    def _disconnect(self) -> None:
        if self._lane is not None:
            self._leave(self._lane)
            self._lane.close()
            self._lane = None

    # ---- one transfer

    def _transfer(self, lane: Lane, request: Request) -> int:
        """Returns the step that is there now."""
        file, slot = self._newest(request)
        trailer = blocks.trailer_of(file, slot).prefix()
        lane.say(messages.encode(messages.Offer(request.rank, slot.step, slot.kind, trailer.travel, trailer.encode())))
        match messages.to_sender.decode(lane.hear(_ALLOCATE_S)):
            case messages.Have():
                return slot.step
            case messages.Go(key):
                with file.payload(slot.place) as view:
                    self._push(lane, key, view, (file, slot), trailer)
                return slot.step
            case messages.Refused(why):
                raise _Failed(why)
        raise ConnectionError("the peer has answered something else")

    def _newest(self, request: Request) -> tuple[SlotFile, Slot]:
        file = self._held.arena(request.rank)
        slots = file.slots() if file is not None else []
        if file is None or not slots or slots[-1].step < request.step:
            raise _Failed(f"rank {request.rank} has no committed snapshot of step {request.step} any more")
        return file, slots[-1]

    def _push(self, lane: Lane, key: int, view: memoryview, source: tuple[SlotFile, Slot], trailer: blocks.Trailer) -> None:
        cut = trailer.blocks(trailer.travel)
        numbers: range | list[int] = range(len(cut))
        while True:
            for number in numbers:
                if source[1] not in source[0].slots():
                    lane.say(messages.encode(messages.Stop()))
                    break
                start, size = cut[number]
                lane.push(key, start, view[start : start + size], number)
            match messages.to_sender.decode(lane.hear(_REPLY_S)):
                case messages.Done():
                    return
                case messages.Again(again) if all(number < len(cut) for number in again):
                    numbers = again
                case messages.Failed(why, bad):
                    raise _Failed(why + _where(view, cut, trailer.digests, bad))
                case _:
                    raise ConnectionError("the peer has answered something else")


def _where(view: memoryview, cut: list[blocks.Block], digests: list[int], bad: list[int]) -> str:
    """Whose fault it is: the bytes are damaged here, or on the way."""
    if not bad or not all(number < len(cut) for number in bad):
        return ""
    start, size = cut[bad[0]]
    here = blocks.digest(view[start : start + size]) != digests[bad[0]]
    return f": from byte {start} on, {'in the memory of this node' if here else 'on the way'}"
