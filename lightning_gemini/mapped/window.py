"""The batches a feeder keeps: some ahead of the rank that is furthest, some behind the one that is last.

Seam: the producer calls `wait_for_room`, then `add`; the server moves the ranks' positions (`attach`, `want`, `leave`) and asks `batch`.
Sizes in bytes, batches by their number in the epoch. Thread-safe.

What yields to what under the size limit: batches ahead wait for room; a batch that some rank waits for drops those behind, which can be
made again. A single batch above the limit is an error that says so.
"""

from __future__ import annotations

import threading

from lightning_gemini.mapped.files import Held


class Window:
    """`first` is the number of the first batch, `ranks` how many ranks will read them."""

    def __init__(self, first: int, ranks: int, *, ahead: int, behind: int, limit: int) -> None:
        self.first, self.ranks, self.ahead, self.behind, self.limit = first, ranks, ahead, behind, limit
        self.allowed = limit
        """The user's limit; `limit` is less where there was no room for so much."""
        self.next = first
        """The number of the next batch to be made."""
        self.total = 0
        """Bytes kept."""
        self.highest = 0
        """The most bytes ever kept."""
        self._entries: dict[int, Held] = {}
        self._wanted: dict[int, int] = {}
        self._left: set[int] = set()
        self.lock = self._changed = threading.Condition()
        self._over = False

    # ---- the producer

    def wait_until_wanted(self) -> bool:
        """Wait until the next batch may be made. False when nobody needs one any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or self.next < self._furthest() + self.ahead)
            return not self._over

    def wait_for_room(self, size: int) -> bool:
        """Wait until `size` more bytes are within the limit. Raises `ValueError` where they never will be. False when it is over."""
        if size > self.allowed:
            need = -(-size >> 20)
            raise ValueError(f"mapped_data.size_limit_mib={self.allowed >> 20} cannot hold one batch of {size} bytes: give {need} or more")
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._fits(size))
            return not self._over

    def _fits(self, size: int) -> bool:
        needed = self.next <= self._furthest()
        for number in sorted(self._entries):
            if self.total + size <= self.limit or not needed or number >= self._slowest():
                break
            self._drop(number)
        return self.total + size <= self.limit or not self._entries

    def shrink(self) -> bool:
        """There is no room for another batch beside those that are kept: let them be the most. False where none is kept."""
        with self._changed:
            if self.total:
                self.limit = self.total
            return bool(self.total)

    def add(self, entry: Held) -> None:
        """The next batch."""
        with self._changed:
            self._entries[self.next] = entry
            self.next += 1
            self.total += entry.size
            self.highest = max(self.highest, self.total)

    # ---- the server

    @property
    def deserted(self) -> bool:
        """Whether all ranks have left."""
        return len(self._left) >= self.ranks

    def attach(self, member: int, number: int) -> bool:
        """A rank reads from `number` on. False where that is no longer there."""
        with self._changed:
            if number < self.next and number not in self._entries:
                return False
            self._left.discard(member)
            self._wanted[member] = number
            self._changed.notify_all()
            return True

    def want(self, member: int, number: int) -> None:
        """A rank has used all batches before `number`."""
        with self._changed:
            self._wanted[member] = max(number, self._wanted.get(member, self.first))
            for old in [old for old in self._entries if old < self._slowest() - self.behind]:
                self._drop(old)
            self._changed.notify_all()

    def leave(self, member: int) -> None:
        """A rank needs nothing more from here."""
        with self._changed:
            self._left.add(member)
            self._wanted.pop(member, None)
            self._changed.notify_all()

    def batch(self, number: int) -> Held | None:
        """What is kept under that number."""
        return self._entries.get(number)

    def end(self) -> None:
        """Nobody reads any more."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    # ---- with the lock held

    def _furthest(self) -> int:
        return max(self._wanted.values(), default=self.first)

    def _slowest(self) -> int:
        return min(self._wanted.values(), default=self.next) if len(self._wanted) + len(self._left) >= self.ranks else self.first

    def _drop(self, number: int) -> None:
        entry = self._entries.pop(number)
        self.total -= entry.size
        entry.close()
