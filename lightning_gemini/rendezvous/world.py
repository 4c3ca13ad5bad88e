"""What all process groups of a rank share: the generation, the mode, the first error, the log of collectives.

Modes, set by the recovery:
    STAND_IN  nobody is there: a replaced rank runs the script's set-up, each collective answers as if all ranks had sent what we send.
    BETWEEN   between steps (callbacks, validation, barriers): a collective either completes or waits, through any number of recoveries,
              and is tried again; its result is logged. The caller never sees a fault of somebody else.
    STEP      inside a training step: an error is absorbed and remembered, every further collective completes at once, so that DDP's
              reducer and FSDP2's hooks finish in good order; the step is then repeated (see `recovery.step`).

Failure: a group that cannot be formed (a member died meanwhile) is an error of the collective that asked for it.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from lightning_gemini.peers.errors import StaleGeneration
from lightning_gemini.peers.node import PeerNode
from lightning_gemini.peers.roster import Roster
from lightning_gemini.rendezvous import backends
from lightning_gemini.rendezvous.store import PeerStore
from lightning_gemini.rendezvous.works import Outstanding
from lightning_gemini.snapshot.collective_log import CollectiveLog
from lightning_gemini.state.raw import pack, unpack


class Mode(enum.Enum):
    """See the module's docstring."""

    STAND_IN = "stand_in"
    BETWEEN = "between"
    STEP = "step"


class Membership(Protocol):
    """Who says that a generation is over: the agent's link, or whatever a program without one has."""

    @property
    def announced(self) -> int:
        """The newest generation that has been announced."""


class World:
    """Shared state of a rank's groups; `stand_still` is installed by the recovery and returns when the job has regrouped."""

    def __init__(self, membership: Membership, collective_timeout_s: float) -> None:
        self.membership = membership
        self.generation = membership.announced
        self.mode = Mode.BETWEEN
        self.error: BaseException | None = None
        self.counters: dict[str, int] = {}
        self.log: CollectiveLog | None = None
        self.replay: dict[tuple[str, int], bytes | None] = {}
        """Results of collectives that peers completed without this rank, by (group, index)."""
        self.outstanding = Outstanding()
        self.stand_still: Callable[[BaseException | None], None] = _no_recovery
        self._peers: PeerNode | None = None
        self._endpoints = backends.Endpoints()
        self._timeout_s = collective_timeout_s
        self._nccl: list[Any] = []

    def join(self, roster: Roster, rank: int, token: bytes = b"") -> None:
        """Become a rank: listen for its peers."""
        self._peers = PeerNode(roster, rank, token=token, generation=self.generation, timeout_s=self._timeout_s)

    @property
    def joined(self) -> bool:
        """Whether this process has a rank."""
        return self._peers is not None

    @property
    def peers(self) -> PeerNode:
        """This rank among its peers."""
        assert self._peers is not None, "this process has no rank yet"
        return self._peers

    @property
    def rank(self) -> int:
        """Global rank."""
        return self.peers.rank

    @property
    def size(self) -> int:
        """Ranks of the job."""
        return self.peers.roster.size

    def enter(self, generation: int, hosts: Sequence[str] = ()) -> None:
        """Take part in a generation; `hosts` of the nodes, where they may have changed."""
        self.generation = generation
        if hosts and self._peers is not None:
            roster = self._peers.roster
            self._peers.roster = Roster.on_hosts(roster.job, hosts, roster.size // len(hosts))
        if self._peers is not None:
            self._peers.open(generation)

    def leave(self) -> None:
        """Close the listener and all connections to peers."""
        if self._peers is not None:
            self._peers.close()

    @property
    def stale(self) -> bool:
        """Whether a recovery has been announced that this rank has not joined yet."""
        return self.membership.announced != self.generation

    def require_current(self) -> None:
        """Raise `StaleGeneration` once a recovery has been announced."""
        if self.stale:
            raise StaleGeneration(f"generation {self.generation} is over, {self.membership.announced} has begun")

    def note(self, error: BaseException) -> None:
        """Remember the first error of a step."""
        if self.error is None:
            self.error = error

    def form(self, name: str, rank: int, members: Sequence[int], device: str) -> Any:
        """A backend for group `name` of global ranks `members` in the current generation. All members call it."""
        self.require_current()
        store = PeerStore(self.peers, generation=self.generation, prefix=f"{name}/{device}/", members=members)
        if device == "cuda":  # pragma: no cover - needs a GPU
            self._nccl.append(backends.form_nccl(store, rank, len(members), self._timeout_s))
            return self._nccl[-1]
        listener, (host, port) = self._endpoints.listen(self.peers.host)
        everyone = self.peers.all_gather(
            self.generation, f"{name}/{device}/endpoints", rank, len(members), f"{host} {port}".encode(), members, self._timeout_s
        )
        self._endpoints.expect([(where[0], int(where[1])) for where in (entry.decode().split() for entry in everyone)])
        group = backends.abandonable(
            lambda: backends.form_gloo(store, rank, len(members), listener, self._timeout_s), over=lambda: self.stale
        )
        self.require_current()
        return group

    def free(self) -> None:
        """Get this process's threads out of collectives of the old generation. Called in the thread that learns of the new one, and over
        before anybody here forms a group of it: what is formed by then belongs to the old."""
        if self._peers is not None:
            self._peers.open(self.membership.announced)
        self._endpoints.free()
        while self._nccl:  # pragma: no cover - needs a GPU
            backends.abort_nccl(self._nccl.pop())
        self.outstanding.let_go()

    # ---- the log

    def recorded(self, group: str, tensors: list[torch.Tensor]) -> bool:
        """Take the result of the next collective of `group` from a peer's log, if it is there."""
        index = self.counters.get(group, 0)
        if (group, index) not in self.replay:
            return False
        data = self.replay.pop((group, index))
        if data is None:
            raise RuntimeError(
                f"the result of collective {index} of group {group!r} did not fit its log: raise snapshot.collective_log_mib"
            )
        unpack(data, tensors)
        self.record(group, tensors)
        return True

    def replays(self, group: str, count: int) -> bool:
        """Whether the next `count` collectives of `group` will be taken from a peer's log."""
        index = self.counters.get(group, 0)
        return all((group, index + further) in self.replay for further in range(count))

    def record(self, group: str, tensors: list[torch.Tensor]) -> None:
        """Log a completed collective."""
        index = self.counters.get(group, 0)
        if self.log is not None:
            self.log.append(group, index, pack(tensors))
        self.counters[group] = index + 1


def _no_recovery(error: BaseException | None) -> None:
    raise error or RuntimeError("a recovery was announced before this process could take part in one")
