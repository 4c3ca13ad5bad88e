"""Snapshots between agents: the facade that an agent uses.

Seam: `open` begins a generation; `send` has a rank's newest snapshot replicated; `fetch` refills arenas of this node from replicas and
twins; `fetch_results` brings results of collectives; `connect_control` is the agents' own line. What happens meanwhile is told to the
observer, from `poll`.

No call waits for another node, but `connect_control`, which has a deadline. Threads: one at the door, one for each peer that is sent to,
one for each connection that a peer has made, one for each source of a fetch; all in blocking calls of the kernel, ended by shutting their
sockets and joined in `close`.

A connection belongs to one generation. When the next one is opened, all older ones end, unfinished transfers with them; requests to send
are forgotten (call `send` again), fetches fail with `StaleGeneration`, replicas and acknowledgements of nodes that stay are kept. Nothing
of an older generation is committed.
"""

from __future__ import annotations

import concurrent.futures
import functools
import socket
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lightning_gemini.peers import wire
from lightning_gemini.peers.errors import StaleGeneration, Unreachable
from lightning_gemini.peers.roster import is_loopback
from lightning_gemini.replication import messages
from lightning_gemini.replication.acknowledged import Acknowledged
from lightning_gemini.replication.answers import Answers
from lightning_gemini.replication.arenas import Held
from lightning_gemini.replication.dial import HANDSHAKE_S, dial
from lightning_gemini.replication.door import Door
from lightning_gemini.replication.events import Events, Observer
from lightning_gemini.replication.fence import Fence, Members, Peer
from lightning_gemini.replication.fetching import Fetch
from lightning_gemini.replication.refill import Want
from lightning_gemini.replication.results import Found, fetch_results
from lightning_gemini.replication.sending import Sender
from lightning_gemini.replication.shelf import Shelf
from lightning_gemini.replication.sources import Local, Remote, Source
from lightning_gemini.replication.store import Store
from lightning_gemini.replication.tcp import TcpLane, prepare
from lightning_gemini.replication.threads import Threads
from lightning_gemini.replication.transport import Lane
from lightning_gemini.snapshot.manifest import manifest_of

_CLOSE_S = 5.0
_BACKLOG = 1024


class Lag(NamedTuple):
    """A snapshot that is not on a node yet."""

    wanted: int
    """Step."""
    acknowledged: int
    """Newest step of the rank that is there; -1 for none."""
    behind_s: float
    """Since it was asked for."""


class Exchange:
    """See the module's docstring. All methods are called in the agent's own thread."""

    def __init__(self, *, job: str, token: bytes, node: str, host: str, observer: Observer) -> None:
        if not is_loopback(host):
            wire.require_token(token)
        self._job, self._token, self._node, self._observer = job, token, node, observer
        self._fence, self._events, self._threads = Fence(), Events(), Threads()
        self._held, self._store, self._acknowledged = Held(), Store(), Acknowledged()
        self._shelf = Shelf(self._held, self._store)
        self._senders: dict[int, Sender] = {}
        self._ended: list[Sender] = []
        self._fetches: list[Fetch] = []
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        server = socket.create_server((host, 0), family=family, backlog=_BACKLOG)
        self.port: int = server.getsockname()[1]
        answers = Answers(job, node, self._fence, self._events, self._threads, self._held, self._store, self._shelf)
        self._door = Door(server, token, answers.admit, answers.hand, self._events.news)

    # ---- membership

    def open(self, generation: int, peers: Mapping[int, Peer], index: int) -> None:
        """Begin a generation, or tell of nodes that have filled its vacant places. Raises `StaleGeneration` for an older one."""
        newer = generation > self._fence.members.generation
        self._fence.advance(Members(generation, index, dict(peers)))
        if newer:
            self._end_senders()
            self._cancel(StaleGeneration(f"generation {generation} has begun"))
        self._acknowledged.keep_only({peer.node for peer in peers.values()})
        self._door.look_again()

    def hold(self, files: Mapping[int, int]) -> None:
        """The arenas of this node's ranks: rank -> memfd, which stays the caller's."""
        self._held.hold(files)

    def hold_logs(self, files: Mapping[int, int]) -> None:
        """Their logs of collectives."""
        self._held.hold_logs(files)

    # ---- replicas

    def send(self, rank: int, step: int, targets: Sequence[int]) -> None:
        """The newest snapshot of `rank`, which is of `step` or later, shall get to the nodes at these indices.

        A request that waits is replaced by the newer one. Raises `ValueError` for an index that no other node has.
        """
        for index in targets:
            self._sender(index).request(rank, step)

    def lag(self) -> dict[tuple[int, int], Lag]:
        """By (rank, index): what was asked for and is not there yet."""
        peers = self._fence.members.peers
        return {
            (request.rank, index): Lag(request.step, self._acknowledged.newest(request.rank, peers[index].node), request.age_s())
            for index, sender in self._senders.items()
            for request in sender.requests()
        }

    def acknowledged(self, rank: int, index: int) -> int:
        """Newest step of `rank` that the node at `index` has acknowledged, in whichever generation; -1 for none."""
        return self._acknowledged.newest(rank, self._fence.members.peers[index].node)

    def replicas(self) -> dict[int, list[int]]:
        """Rank of another node -> complete steps that are kept here."""
        return self._store.replicas()

    def keys_of_replicas(self) -> dict[int, dict[int, str]]:
        """Rank of another node -> complete steps that are kept here -> key of the twins, which hold the rest (see `snapshot.manifest`)."""
        kept = {rank: {step: self._store.find(rank, step) for step in steps} for rank, steps in self.replicas().items()}
        return {rank: {step: manifest_of(*found)[0].key for step, found in versions.items() if found} for rank, versions in kept.items()}

    def forget_after(self, step: int) -> None:
        """A recovery went back to `step`: later versions are dropped, here and in what is known of others. Call it after `open`."""
        for sender in self._senders.values():
            sender.forget_after(step)
        self._acknowledged.forget_after(step)
        self._store.forget_after(step)

    def drop(self, ranks: Sequence[int]) -> None:
        """Free the replicas of some ranks."""
        self._store.drop(ranks)

    # ---- recovery

    def fetch(self, wants: Sequence[Want]) -> concurrent.futures.Future[None]:
        """Refill arenas. The future fails with `refill.Impossible`, `MemoryError`, `CorruptSnapshot` or `StaleGeneration`."""
        self._fetches = [fetch for fetch in self._fetches if not fetch.future.done()]
        fetch = Fetch(wants, functools.partial(self._source, self._fence.members), self._threads.start, self._events.wake)
        self._fetches.append(fetch)
        return fetch.future

    def fetch_results(self, index: int, rank: int, groups: Mapping[str, int]) -> concurrent.futures.Future[Found]:
        """Results of collectives that the log of `rank`, on the node at `index`, has: of each group from the given number on.

        The future fails with `OSError`, `RendezvousError` or `LookupError`.
        """
        lane = functools.partial(self._lane, self._fence.members, index, messages.PULL)
        future, work = fetch_results(lane, self._leave, rank, dict(groups), self._events.wake)
        self._threads.start(f"results-{index}", work)
        return future

    def connect_control(self, index: int, limit_s: float = HANDSHAKE_S) -> socket.socket:
        """A proved, blocking connection to the agent at `index`; it is the caller's. Raises `OSError`, `RendezvousError`."""
        sock = self._dial(self._fence.members, index, messages.CONTROL, limit_s)
        prepare(sock)
        return sock

    # ---- the agent's loop

    def fileno(self) -> int:
        """Readable when `poll` has something to do, or a future is done."""
        return self._events.fileno()

    def poll(self) -> None:
        """Make the calls to the observer that are due."""
        self._events.deliver(self._observer)

    def close(self) -> None:
        """End every connection and thread, free the replicas. Fetches fail."""
        self._door.close()
        self._fence.close()
        self._end_senders()
        self._cancel(StaleGeneration("this node has left"))
        self._threads.join(_CLOSE_S)
        for sender in self._ended:
            sender.join(_CLOSE_S)
        self._store.close()
        self._held.close()
        self._events.close()

    # ---- connections that this node makes

    def _dial(self, members: Members, index: int, purpose: str, limit_s: float = HANDSHAKE_S) -> socket.socket:
        if index not in members.peers:
            raise Unreachable(f"no node has index {index} in generation {members.generation}")
        peer = members.peers[index]
        words = messages.Hello(job=self._job, generation=members.generation, node=self._node, to=peer.node, purpose=purpose)
        return dial(peer, words, self._token, self._fence, limit_s)

    def _lane(self, members: Members, index: int, purpose: str) -> TcpLane:
        lane = TcpLane(self._dial(members, index, purpose))
        try:
            self._fence.admit(lane, members.generation)
        except StaleGeneration:
            lane.close()
            raise
        return lane

    def _leave(self, lane: Lane) -> None:
        self._fence.leave(lane)

    def _source(self, members: Members, index: int) -> Source:
        return Local(self._shelf) if index == members.index else Remote(self._lane(members, index, messages.PULL), self._leave)

    def _sender(self, index: int) -> Sender:
        members = self._fence.members
        if index == members.index or index not in members.peers:
            raise ValueError(f"targets: index {index} is not that of another node of generation {members.generation}")
        if index not in self._senders:
            peer = members.peers[index]
            reports = _Reports(self._events, self._acknowledged, index, peer.node)
            connect = functools.partial(self._lane, members, index, messages.PUSH)
            self._senders[index] = Sender(peer.node, connect, self._leave, self._held, reports)
        return self._senders[index]

    def _end_senders(self) -> None:
        for sender in self._senders.values():
            sender.stop()
        self._ended = [sender for sender in [*self._ended, *self._senders.values()] if not sender.join(0)]
        self._senders = {}

    def _cancel(self, error: BaseException) -> None:
        for fetch in self._fetches:
            fetch.cancel(error)
        self._fetches = []


class _Reports:
    """From a sender to the observer."""

    def __init__(self, events: Events, acknowledged: Acknowledged, index: int, node: str) -> None:
        self._events, self._acknowledged, self._index, self._node = events, acknowledged, index, node
        self.news = events.news

    def replicated(self, rank: int, step: int) -> None:
        """See `sending.Reports`."""
        self._acknowledged.add(rank, self._node, step)
        self._events.put(lambda observer: observer.on_replicated(rank, step, self._index))

    def failed(self, rank: int, step: int, why: str) -> None:
        """See `sending.Reports`."""
        self._events.put(lambda observer: observer.on_failed(rank, step, self._index, why))
