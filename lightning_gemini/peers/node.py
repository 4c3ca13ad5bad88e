"""A rank among its peers: one listener, connections made when needed, one event loop in a thread of its own.

Seam: `PeerNode(roster, rank, …)`; `open(generation)` begins a generation; `call` runs one request, `all_gather` one exchange, from any
thread, each with a deadline. `close` joins the thread. Nothing here imports torch.

States of a generation: open -> over. When it is over, what waits in it raises `StaleGeneration`, its connections close, its keys are gone.
A dialler of an older generation is refused and told which one it is now; one of a newer generation waits until this rank has opened it too.

Failures: own address taken -> the next candidate, then `Unreachable`; taken by a process that claims the same rank -> `DuplicateRank`. A
peer that does not answer is dialled again until the deadline (ranks may start long after each other), then `Unreachable` names it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import logging
import socket
import threading
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from lightning_gemini.forks import not_in_children
from lightning_gemini.peers import wire
from lightning_gemini.peers.connection import Listener
from lightning_gemini.peers.dial import Resolver, bind
from lightning_gemini.peers.errors import RendezvousError, StaleGeneration, Unreachable
from lightning_gemini.peers.generation import Generation
from lightning_gemini.peers.roster import Roster

log = logging.getLogger(__name__)
T = TypeVar("T")
_CLOSE_S = 5.0
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class PeerNode:
    """See the module's docstring."""

    def __init__(
        self,
        roster: Roster,
        rank: int,
        *,
        token: bytes = b"",
        generation: int = 0,
        timeout_s: float = 300.0,
        listening: socket.socket | None = None,
    ) -> None:
        if not 0 <= rank < roster.size:
            raise ValueError(f"rank={rank} is not in the roster of job {roster.job!r}, which has {roster.size} ranks")
        if not roster.local:
            wire.require_token(token)
        self.roster, self.rank, self.token, self.timeout_s = roster, rank, token, timeout_s
        self.listening = listening
        """A socket that is bound to this rank's address already."""
        self.ahead: dict[int, int] = {}
        """Peers that wait for this rank to open a newer generation, and which."""
        self.process = wire.nonce()
        self.resolver = Resolver()
        self.address = roster.addresses[rank][0]
        """Where this rank listens."""
        self.host = "127.0.0.1"
        """Its host, in numbers: where this process's backends may listen too."""
        self.accepted = 0
        """Connections that peers have made to this rank."""
        self.requests = 0
        """Requests of peers that this rank has answered."""
        self._kept: defaultdict[int, list[object]] = defaultdict(list)
        self._listeners: set[Listener] = set()
        self._now = Generation(generation, self)
        self._news = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lightning-gemini-peers", daemon=True)
        self._thread.start()
        try:
            self._server = self._submit(self._listen(), timeout_s)
        except TimeoutError:
            self.close()
            places = ", ".join(map(str, roster.addresses[rank]))
            raise Unreachable(f"rank {rank} of job {roster.job!r} found no address to listen at within {timeout_s:g} s: {places}") from None
        except BaseException:
            self.close()
            raise

    # ---- any thread

    @property
    def generation(self) -> int:
        """The present one."""
        return self._now.number

    def open(self, generation: int) -> None:
        """Begin a generation; returns at once, also from a signal handler's or listener's thread."""
        if generation > self._now.number:
            self._loop.call_soon_threadsafe(self._open, generation)

    def keep(self, generation: int, thing: object) -> None:
        """Hold a reference until `generation` is over: torch's C++ side calls Python stores without keeping them alive."""
        self._kept[generation].append(thing)

    def call(self, generation: int, message: wire.Get | wire.Check | wire.Change, timeout_s: float | None = None) -> Any:
        """One request about a key. Raises `StaleGeneration`, `PeerLost`, `Unreachable`, `TimeoutError`."""

        def start(now: Generation) -> Coroutine[Any, Any, Any]:
            if isinstance(message, wire.Get):
                return now.keys.serve(message, self.rank)  # climbs the tree by itself
            return now.ask(now.keys.owner(message.key), message)

        return self._run(generation, start, timeout_s)

    def all_gather(
        self,
        generation: int,
        name: str,
        rank: int,
        size: int,
        value: bytes,
        members: Sequence[int] | None = None,
        timeout_s: float | None = None,
    ) -> list[bytes]:
        """The values of all `size` members of group `name`, by group rank, in ceil(log2 size) rounds.

        Args:
            generation: in which it takes place.
            name: the group; used once in a generation.
            rank: this member's number in the group.
            size: members of the group.
            value: what this member gives.
            members: their global ranks. Where they are not known, mailboxes are spread over all ranks of the job by hashing.
            timeout_s: limit of the whole exchange.
        """
        if members is None and size == self.roster.size:
            members = range(size)

        def home(member: int, box: str) -> int:
            return members[member] if members is not None else self._now.keys.owner(box)

        return self._run(generation, lambda now: now.all_gather(name, rank, size, value, home), timeout_s)

    def close(self) -> None:
        """Stop listening, close every connection, join the thread."""
        if self._thread.is_alive():
            with contextlib.suppress(TimeoutError, RendezvousError):
                self._submit(self._shut(), _CLOSE_S)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_CLOSE_S)
        if not self._loop.is_running() and not self._loop.is_closed():
            self._loop.close()

    def _run(self, generation: int, start: Callable[[Generation], Coroutine[Any, Any, T]], timeout_s: float | None) -> T:
        async def guarded() -> T:
            now, task = self._now, asyncio.current_task()
            if generation != now.number:
                raise StaleGeneration(f"generation {generation} is over, {now.number} has begun")
            assert task is not None
            now.tasks.add(task)
            try:
                return await start(now)
            except asyncio.CancelledError:
                if now is self._now:
                    raise
                raise StaleGeneration(f"generation {generation} is over, {self._now.number} has begun") from None
            finally:
                now.tasks.discard(task)

        return self._submit(guarded(), self.timeout_s if timeout_s is None else timeout_s)

    def _submit(self, coroutine: Coroutine[Any, Any, T], timeout_s: float) -> T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(timeout_s)
        except concurrent.futures.TimeoutError:  # before Python 3.11 not the built-in one
            future.cancel()
            raise TimeoutError(f"rank {self.rank} waited {timeout_s:g} s") from None
        except BaseException:
            future.cancel()
            raise

    # ---- the loop's thread

    def _open(self, generation: int) -> None:
        if generation > self._now.number:
            old, self._now = self._now, Generation(generation, self)
            old.over()
            for listener in [listener for listener in self._listeners if listener.generation == old.number]:
                listener.dismiss(f"generation {old.number} is over, {generation} has begun")
            self._kept = defaultdict(list, {number: things for number, things in self._kept.items() if number >= generation})
            self._news.set()
            self.ahead = {rank: number for rank, number in self.ahead.items() if number > generation}
            self._news = asyncio.Event()

    async def _listen(self) -> socket.socket:
        server, self.address = await bind(self)
        not_in_children(server)
        self._loop.add_reader(server.fileno(), self._accept, server)
        if not self.address.is_unix:
            self.host = await self.resolver.find(self.address.host)
        return server

    def _accept(self, server: socket.socket) -> None:
        while True:
            try:
                sock, _ = server.accept()
            except BlockingIOError:  # nobody more is there
                return
            except OSError as error:
                if error.errno not in _NO_ROOM:  # a peer that has gone again
                    continue
                log.warning("rank %s cannot take a connection (%s): it tries again in a second", self.rank, error.strerror)
                self._loop.remove_reader(server.fileno())
                self._loop.call_later(1.0, self._loop.add_reader, server.fileno(), self._accept, server)
                return
            listener = Listener(sock, self.token, self._admit, self._serve, self._listeners.discard)
            self._listeners.add(listener)
            listener.begin()

    async def _admit(self, hello: wire.Hello) -> wire.Refusal | None:
        if hello.version != wire.VERSION:
            text = f"this is version {wire.VERSION} of the protocol, not {hello.version}: use one version of lightning_gemini"
            return wire.Refusal("wrong", text)
        if (hello.job, hello.to) != (self.roster.job, self.rank):
            return wire.Refusal("wrong", f"this is rank {self.rank} of job {self.roster.job!r}")
        with contextlib.suppress(asyncio.TimeoutError):
            while hello.generation > self._now.number:
                self.ahead[hello.rank] = hello.generation
                await asyncio.wait_for(asyncio.shield(self._news.wait()), self.timeout_s)
        now = self._now
        if hello.generation > now.number:
            text = f"rank {self.rank} has stayed in generation {now.number} for {self.timeout_s:g} s; {hello.generation} is wanted"
            return wire.Refusal("wrong", text)
        if hello.generation < now.number:
            log.warning("refused rank %s of generation %s: this is generation %s", hello.rank, hello.generation, now.number)
            return wire.Refusal("stale", f"generation {hello.generation} is over, {now.number} has begun")
        if hello.rank == self.rank or now.processes.setdefault(hello.rank, hello.process) != hello.process:
            text = f"rank {hello.rank} of job {hello.job!r} is another process already: give each process a rank of its own"
            return wire.Refusal("duplicate", text)
        self.accepted += 1
        return None

    def _serve(self, message: wire.Message, asker: int) -> Coroutine[Any, Any, Any] | None:
        self.requests += 1
        if isinstance(message, wire.Post):
            self._now.keys.post(message.box, message.blocks)
            return None
        return self._now.keys.serve(message, asker)

    async def _shut(self) -> None:
        server: socket.socket | None = getattr(self, "_server", None)
        if server is not None:
            self._loop.remove_reader(server.fileno())
            server.close()
        self._now.over()
        for listener in list(self._listeners):
            listener.dismiss("it has left", leaving=True)
        leftover = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in leftover:
            task.cancel()
        await asyncio.gather(*leftover, return_exceptions=True)
        await self._loop.shutdown_default_executor()  # the thread that looks up names
