"""Replicas: the snapshots of other nodes' ranks that this node keeps, each rank in a `SlotFile` of its own over a memfd.

Seam: `begin` gives a `Draft` to fill beside the newest version; `Draft.commit` makes it the newest, `Draft.end` gives the slot back. `find`
serves readers; `replicas`, `forget_after` and `drop` are the agent's. One draft at a time for each rank: a second one waits for the first.

States of a version: draft -> complete -> overwritten by the next but one, or forgotten. Memory is taken when a rank's first snapshot comes
(two slots), and again when one outgrows its slot: the newest version is copied over first.

Failure: no memory -> `MemoryError` with the figures, nothing has changed. A file that was dropped under a draft -> `LookupError` at the
commit.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable

from lightning_gemini.memory_size import available_memory
from lightning_gemini.snapshot import blocks
from lightning_gemini.snapshot.slots import CorruptSnapshot, Slot, SlotFile

_MIB = 1 << 20
_TURN_S = 30.0
"""Limit of waiting for another draft of the same rank: its connection has ended, or will by its own deadline."""


class Draft:
    """A slot to fill."""

    def __init__(self, store: Store, rank: int, file: SlotFile, step: int, kind: int, length: int, trailer: blocks.Trailer) -> None:
        self._store, self._rank, self._file = store, rank, file
        self._step, self._kind, self._length, self._trailer = step, kind, length, trailer
        self._place = file.begin()
        self.view = file.payload(self._place)
        """The payload's memory."""

    def commit(self) -> None:
        """All blocks are there and verified. Raises `LookupError` when the rank was dropped meanwhile."""
        self._store._commit(self._rank, self._file, self._seal)

    def _seal(self) -> None:
        blocks.seal(self._file, self._place, step=self._step, kind=self._kind, length=self._length, trailer=self._trailer)

    def end(self) -> None:
        """The slot is not written any more, committed or not."""
        self.view.release()
        self._store._turns[self._rank].release()


class Store:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._files: dict[int, SlotFile] = {}
        self._turns: dict[int, threading.Lock] = {}
        self._lock = threading.Lock()
        self._memory = threading.Lock()
        """Held from the look at what is available until it is taken."""

    def replicas(self) -> dict[int, list[int]]:
        """Rank -> complete steps."""
        with self._lock:
            found = {rank: sorted({slot.step for slot in file.slots()}) for rank, file in self._files.items()}
        return {rank: steps for rank, steps in found.items() if steps}

    def find(self, rank: int, step: int) -> tuple[SlotFile, Slot] | None:
        """The newest complete version of a step."""
        with self._lock:
            file = self._files.get(rank)
            slot = file.find(step) if file is not None else None
        return None if file is None or slot is None else (file, slot)

    def has(self, rank: int, step: int, length: int, trailer: blocks.Trailer) -> bool:
        """Whether just this version is here: the same step, made again after a recovery, might be another."""
        found = self.find(rank, step)
        with contextlib.suppress(CorruptSnapshot):
            return found is not None and found[1].length == length and blocks.trailer_of(*found) == trailer
        return False

    def begin(self, rank: int, step: int, kind: int, length: int, trailer: blocks.Trailer) -> Draft:
        """A slot to fill, which `Draft.end` gives back. Raises `MemoryError`, or `TimeoutError` when another draft does not end."""
        with self._lock:
            turn = self._turns.setdefault(rank, threading.Lock())
        if not turn.acquire(timeout=_TURN_S):
            raise TimeoutError(f"another replica of rank {rank} has been arriving for {_TURN_S:g} s")
        try:
            file = self._room(rank, blocks.size_of_slot(length, trailer.travel, trailer.chunk))
            return Draft(self, rank, file, step, kind, length, trailer)
        except BaseException:
            turn.release()
            raise

    def forget_after(self, step: int) -> None:
        """A recovery went back to `step`: later versions belong to a past that did not happen."""
        with self._lock:
            for file in self._files.values():
                for slot in file.slots():
                    if slot.step > step:
                        file.invalidate(slot)

    def drop(self, ranks: Iterable[int]) -> None:
        """Free the memory of some ranks."""
        with self._lock:
            for rank in ranks:
                if (file := self._files.pop(rank, None)) is not None:
                    _free(file)

    def close(self) -> None:
        """Free everything."""
        self.drop(list(self._files))

    def _commit(self, rank: int, file: SlotFile, seal: Callable[[], None]) -> None:
        with self._lock:
            if self._files.get(rank) is not file:
                raise LookupError(f"the replicas of rank {rank} were dropped")
            seal()

    def _room(self, rank: int, size: int) -> SlotFile:
        with self._lock:
            known = self._files.get(rank)
        if known is not None and size <= known.capacity:
            return known
        file = self._take(rank, size + size // 16)  # the rank-local state differs by a little from step to step
        with self._lock:
            if known is not None:
                _copy_newest(known, file)
                _free(known)
            self._files[rank] = file
        return file

    def _take(self, rank: int, capacity: int) -> SlotFile:
        with self._memory:
            if 2 * capacity > (available := available_memory()):
                raise MemoryError(
                    f"two slots for replicas of rank {rank} need {2 * capacity / _MIB:.0f} MiB, {available / _MIB:.0f} MiB of memory are "
                    "available: keep fewer copies, or use nodes with more memory"
                )
            file = SlotFile(os.memfd_create(f"gemini-replica-{rank}", os.MFD_CLOEXEC))
            try:
                file.allocate(capacity)
            except OSError as error:
                _free(file)
                raise MemoryError(f"two slots for replicas of rank {rank}, {2 * capacity / _MIB:.0f} MiB: {error.strerror}") from None
        return file


def _copy_newest(old: SlotFile, new: SlotFile) -> None:
    for slot in old.slots()[-1:]:
        with contextlib.suppress(CorruptSnapshot):
            trailer = blocks.trailer_of(old, slot)
            place = new.begin()
            with old.payload(slot.place) as source, new.payload(place) as target:
                target[: slot.length] = source[: slot.length]
            blocks.seal(new, place, step=slot.step, kind=slot.kind, length=slot.length, trailer=trailer)


def _free(file: SlotFile) -> None:
    os.close(file.fd)  # not unmapped here: a thread may be reading it, and the memory goes with its last reader
