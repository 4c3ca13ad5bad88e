"""A fetch: several arenas refilled at the same time, their blocks striped over all sources by one queue of work.

Seam: `Fetch(wants, …)` starts one thread for each source; `future` is done when every arena is committed, or fails when that has become
impossible and nobody writes any more. `cancel` fails it.

States of a block: waiting -> under way (in one source's window) -> verified, or waiting again: its source died, or its bytes did not match.
So a fast source brings more blocks than a slow one, and a dead one none. A source that stands still while another could bring its blocks is
given up.

Failure: `Impossible` (see `refill`), `MemoryError`, `CorruptSnapshot`, or what `cancel` was given.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec

from lightning_gemini.peers.errors import RendezvousError
from lightning_gemini.replication.refill import Impossible, Item, Part, Refill, Spot, Want
from lightning_gemini.replication.sources import Source
from lightning_gemini.snapshot import blocks
from lightning_gemini.snapshot.slots import CorruptSnapshot

_WINDOW = 4
"""Blocks that one source is asked for before the first has come: what a round trip costs is hidden behind them."""
STALL_S = 5.0
_LOOK_S = 0.5


class _Worker:
    """One source and its thread."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.source: Source | None = None
        self.under_way: dict[int, tuple[Refill, Item, Spot, memoryview]] = {}
        self.moved = time.monotonic()
        self.given_up = False


class Fetch:
    """See the module's docstring. `connect` gives the source at an index, `start` runs a thread that the caller joins."""

    def __init__(
        self,
        wants: Sequence[Want],
        connect: Callable[[int], Source],
        start: Callable[[str, Callable[[], None]], None],
        done: Callable[[], None],
    ) -> None:
        self.future: concurrent.futures.Future[None] = concurrent.futures.Future()
        self.future.set_running_or_notify_cancel()
        self._connect, self._start, self._done = connect, start, done
        self._refills = [Refill(want) for want in wants]
        self._news = threading.Condition(threading.RLock())
        self._numbers = itertools.count()
        self._error: BaseException | None = None
        self._settled = False
        indices = {spot.index for refill in self._refills for part in refill.parts() for spot in part.candidates}
        self._workers = [_Worker(index) for index in sorted(indices)]
        self._check()
        self._settle()
        for worker in [] if self._over else self._workers:
            start(f"fetch-{worker.index}", functools.partial(self._run, worker))

    def cancel(self, error: BaseException) -> None:
        """Give up, from any thread."""
        with self._news:
            self._fail(error)
        self._settle()

    def _settle(self) -> None:
        """The future is done when nobody touches the memory any more. Not called under the lock: it calls whoever waits."""
        with self._news:
            self._news.notify_all()
            working = any(worker.source is not None for worker in self._workers) or any(refill.reserving for refill in self._refills)
            failed = self._error is not None and not working
            if self._settled or not (failed or (self._error is None and all(refill.done for refill in self._refills))):
                return
            self._settled = True
            for refill in self._refills:
                refill.close()
        if self._error is not None:
            self.future.set_exception(self._error)
        else:
            self.future.set_result(None)
        self._done()

    # ---- under the lock

    def _fail(self, error: BaseException) -> None:
        if self._over:
            return
        self._error = error
        for worker in self._workers:
            if worker.source is not None:
                worker.source.shut()

    def _check(self) -> None:
        try:
            for refill in self._refills:
                refill.check()
        except Impossible as error:
            self._fail(error)

    @property
    def _over(self) -> bool:
        return self._error is not None or self._settled

    def _roles(self, index: int) -> Iterator[tuple[Refill, Part, Spot]]:
        for refill in self._refills:
            for part in refill.parts():
                yield from ((refill, part, spot) for spot in list(part.candidates) if spot.index == index)

    # ---- a source's thread

    def _run(self, worker: _Worker) -> None:
        why = "it has ended"
        try:
            source = self._connect(worker.index)
            with self._news:
                if self._over:
                    return source.close()
                worker.source = source
            self._work(worker, source)
        except (OSError, RendezvousError, msgspec.DecodeError) as error:
            why = str(error)
        except MemoryError as error:
            self.cancel(error)
        finally:
            self._end(worker, why)

    def _end(self, worker: _Worker, why: str) -> None:
        for *_, into in worker.under_way.values():
            into.release()
        with self._news:
            if worker.source is not None:
                worker.source.close()
                worker.source = None
            for _, part, spot in self._roles(worker.index):
                part.refuse(spot, f"was given up: nothing came for {STALL_S:g} s" if worker.given_up else why)
            for _, item, _, _ in worker.under_way.values():
                item.part.waiting.appendleft(item)
            self._check()
        self._settle()

    def _work(self, worker: _Worker, source: Source) -> None:
        for refill, part, spot in list(self._roles(worker.index)):
            self._describe(source, refill, part, spot)
        while True:
            while len(worker.under_way) < _WINDOW and (task := self._take(worker)) is not None:
                number, key, start, into = task
                source.ask(key, start, into, number)
            if not worker.under_way:
                return
            self._arrived(worker, source.arrived())

    def _describe(self, source: Source, refill: Refill, part: Part, spot: Spot) -> None:
        try:
            found = source.describe(spot.rank, refill.want.step)
        except (LookupError, ValueError) as error:
            with self._news:
                part.refuse(spot, str(error))
                return self._check()
        with self._news:
            first = part is refill.travel and refill.claim(found)
        if first:
            refill.prepare()
            if refill.reserving:
                self._start(f"reserve-{refill.want.rank}", functools.partial(self._reserve, refill))
        with self._news:
            if first:
                refill.begin()
            refill.offer(part, spot, found)
            self._check()
            self._news.notify_all()
        self._finish_if_complete(refill)

    def _reserve(self, refill: Refill) -> None:
        try:
            refill.reserve()
        except MemoryError as error:
            self.cancel(error)
        with self._news:
            refill.reserving = False
        self._finish_if_complete(refill)

    def _take(self, worker: _Worker) -> tuple[int, int, int, memoryview] | None:
        """The next range to ask for; waits for one while nothing is under way. None when it is time to receive, or all is over."""
        with self._news:
            while not self._over:
                for refill in self._refills:
                    for part in refill.parts():
                        if (found := part.take(worker.index)) is not None:
                            return self._assign(worker, refill, *found)
                if worker.under_way:
                    return None
                self._give_up_stalled(worker)
                self._news.wait(_LOOK_S)
            return None

    def _assign(self, worker: _Worker, refill: Refill, item: Item, spot: Spot) -> tuple[int, int, int, memoryview]:
        number, found, into = next(self._numbers), item.part.sources[spot], refill.place(item)
        if not worker.under_way:
            worker.moved = time.monotonic()
        worker.under_way[number] = (refill, item, spot, into)
        first = found.trailer.travel if item.part is refill.shared else 0
        return number, found.key, first + item.block.start, into

    def _give_up_stalled(self, idle: _Worker) -> None:
        now = time.monotonic()
        for other in self._workers:
            stands = bool(other.under_way) and other.source is not None and now - other.moved > STALL_S
            tasks = other.under_way.values() if stands else ()
            if any(spot.index == idle.index for _, item, _, _ in tasks for spot in item.part.sources):
                assert other.source is not None
                other.given_up = True
                other.source.shut()  # its thread puts the blocks back, when nothing can write into them any more

    def _arrived(self, worker: _Worker, number: int) -> None:
        refill, item, spot, into = worker.under_way[number]
        assert item.part.digests is not None
        good = blocks.digest(into) == item.part.digests[item.number]
        into.release()
        with self._news:
            del worker.under_way[number]
            worker.moved = time.monotonic()
            if good:
                assert item.part.left is not None
                item.part.left -= 1
            else:
                item.tried[spot] += 1
                start = item.part.first + item.block.start
                item.part.reasons.append(f"node {spot.index}: the checksum of byte {start} on differs")
                item.part.waiting.appendleft(item)
                self._check()
                self._news.notify_all()
        if good:
            self._finish_if_complete(refill)

    def _finish_if_complete(self, refill: Refill) -> None:
        with self._news:
            if refill.complete and not refill.done and not self._over:
                try:
                    refill.finish()
                    refill.close()
                    refill.done = True
                except CorruptSnapshot as error:
                    self._fail(error)
        self._settle()
