"""Generation fencing: who is a member now, and which connections belong to this membership.

Seam: `advance` begins a membership and ends every connection of an older one; `admit` registers a connection and refuses an older one;
`current` is held around what must not happen any more when a newer membership has begun, such as a commit.

States: a generation -> a newer one … -> closed. `StaleGeneration` is what everybody gets who comes too late.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from lightning_gemini.peers.errors import StaleGeneration


class Peer(NamedTuple):
    """An agent: the name of its incarnation, and where it listens."""

    node: str
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Members:
    """A membership, as one node sees it."""

    generation: int
    index: int
    """Of this node."""
    peers: Mapping[int, Peer]
    """By index; this node may be among them."""

    def index_of(self, node: str) -> int | None:
        """Where another node of this membership is."""
        return next((index for index, peer in self.peers.items() if peer.node == node and index != self.index), None)


class Shuttable(Protocol):
    """A connection."""

    def shut(self) -> None:
        """End it from any thread."""


class Fence:
    """See the module's docstring."""

    def __init__(self) -> None:
        self.members = Members(-1, -1, {})
        self._lock = threading.RLock()
        self._open: dict[Shuttable, int] = {}
        self._closed = False

    def advance(self, members: Members) -> None:
        """Begin a newer membership, or replace the present one by a fuller one. Raises `StaleGeneration` for an older one."""
        with self._lock:
            if members.generation < self.members.generation:
                raise StaleGeneration(f"generation {members.generation} is over, {self.members.generation} has begun")
            self.members = members
            self._shut(members.generation)

    def close(self) -> None:
        """End every connection; none is admitted any more."""
        with self._lock:
            self._closed = True
            self._shut(None)

    def _shut(self, generation: int | None) -> None:
        for lane in [lane for lane, number in self._open.items() if number != generation]:
            lane.shut()
            del self._open[lane]

    def admit(self, lane: Shuttable, generation: int) -> None:
        """Register a connection. Raises `StaleGeneration`; the caller closes it then."""
        with self.current(generation):
            self._open[lane] = generation

    def leave(self, lane: Shuttable) -> None:
        """Its owner is about to close it: nobody shuts a descriptor that may belong to somebody else then."""
        with self._lock:
            self._open.pop(lane, None)

    @contextlib.contextmanager
    def current(self, generation: int) -> Iterator[None]:
        """What happens inside happens in `generation`, or not at all. Raises `StaleGeneration`."""
        with self._lock:
            if self._closed or generation != self.members.generation:
                now = "this node has left" if self._closed else f"{self.members.generation} has begun"
                raise StaleGeneration(f"generation {generation} is over, {now}")
            yield
