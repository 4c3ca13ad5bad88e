"""Where a refill takes its bytes from: another node over a lane, or this node's own memory.

Seam: `describe` says what is there of a snapshot, `ask` for a range of it and `arrived` for the next range that has come. Used by one
thread, but for `shut`. Failure: `LookupError` (it is not there), `ValueError` (what is said of it makes no sense), `OSError` (the node is
gone).
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable
from typing import NamedTuple, Protocol

from lightning_gemini.replication import messages
from lightning_gemini.replication.shelf import Shelf
from lightning_gemini.replication.transport import Lane
from lightning_gemini.snapshot import blocks
from lightning_gemini.snapshot.slots import CorruptSnapshot

_DESCRIBE_S = 30.0


class Found(NamedTuple):
    """A committed snapshot, or the travelling part of one."""

    key: int
    """What `ask` wants."""
    kind: int
    whole: int
    """Bytes of the whole payload."""
    twins: str
    """The manifest's key."""
    trailer: blocks.Trailer

    def shared(self) -> list[int] | None:
        """Checksums of the part after the travelling one; None where only that is there."""
        trailer = self.trailer
        known = len(trailer.prefix().digests)
        complete = len(trailer.digests) == len(trailer.blocks(self.whole))
        return trailer.digests[known:] if complete else None


class Source(Protocol):
    """See the module's docstring."""

    def describe(self, rank: int, step: int) -> Found:
        """What is there."""

    def ask(self, key: int, start: int, into: memoryview, number: int) -> None:
        """Bring len(into) bytes from `start` on."""

    def arrived(self) -> int:
        """The number of the next range that is there; unverified."""

    def shut(self) -> None:
        """End every wait, from any thread."""

    def close(self) -> None:
        """Free everything."""


class Remote:
    """Another node."""

    def __init__(self, lane: Lane, leave: Callable[[Lane], None]) -> None:
        self._lane, self._leave = lane, leave

    def describe(self, rank: int, step: int) -> Found:
        """See `Source`."""
        self._lane.say(messages.encode(messages.Describe(rank, step)))
        match messages.from_shelf.decode(self._lane.hear(_DESCRIBE_S)):
            case messages.Described(key, kind, whole, twins, trailer):
                return _checked(Found(key, kind, whole, twins, blocks.Trailer.decode(trailer)))
            case messages.Failed(why):
                raise LookupError(why)
        raise ConnectionError("the node has answered something else")

    def arrived(self) -> int:
        """See `Source`."""
        number = self._lane.completion()
        if number is None:
            raise ConnectionError("the node has said something that nobody asked for")
        return number

    def ask(self, key: int, start: int, into: memoryview, number: int) -> None:
        """See `Source`."""
        self._lane.pull(key, start, into, number)

    def shut(self) -> None:
        """See `Source`."""
        self._lane.shut()

    def close(self) -> None:
        """See `Source`."""
        self._leave(self._lane)
        self._lane.close()


class Local:
    """This node itself."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._keys = itertools.count(1)
        self._views: dict[int, memoryview] = {}
        self._there: collections.deque[int] = collections.deque()

    def describe(self, rank: int, step: int) -> Found:
        """See `Source`."""
        try:
            copy = self._shelf.look(rank, step, replica_first=True)  # an arena of that rank here is the one to be refilled
        except CorruptSnapshot as error:
            raise LookupError(str(error)) from None
        key = next(self._keys)
        self._views[key] = copy.view()
        return Found(key, copy.slot.kind, copy.whole, copy.twins, copy.trailer)

    def ask(self, key: int, start: int, into: memoryview, number: int) -> None:
        """See `Source`."""
        into[:] = self._views[key][start : start + len(into)]
        self._there.append(number)

    def arrived(self) -> int:
        """See `Source`."""
        return self._there.popleft()

    def shut(self) -> None:
        """It never waits."""

    def close(self) -> None:
        """See `Source`."""
        self._views.clear()


def _checked(found: Found) -> Found:
    trailer = found.trailer
    if trailer.chunk <= 0 or not trailer.travel <= found.whole:
        raise ValueError("what it says of the snapshot contradicts itself")
    travelling, shared = -(-trailer.travel // trailer.chunk), -(-(found.whole - trailer.travel) // trailer.chunk)
    if len(trailer.digests) not in (travelling, travelling + shared):
        raise ValueError("it has another number of checksums than of blocks")
    return found
