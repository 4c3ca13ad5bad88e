"""The way from this rank to one other, in one generation.

Seam: `post` (no answer) and `call` (an answer), both usable before there is a connection: what is said meanwhile is kept and sent with the
Hello of each attempt until one is welcome. States: idle -> dialling -> connected -> broken; a broken one dials again at its next use.

Failure: nobody there -> dialled again until the node's timeout, because ranks may start long after each other, then `Unreachable` names
the rank, the addresses and the last problem. Refused as stale or duplicate -> that error at once. Broken after it was welcome ->
`PeerLost`, or `StaleGeneration` if the peer said so. Errors reach the caller of `call`, and the `Exchange` of a post.
"""

from __future__ import annotations

import asyncio
import weakref
from typing import TYPE_CHECKING, Any

from lightning_gemini.peers import wire
from lightning_gemini.peers.connection import Dialler
from lightning_gemini.peers.dial import connect
from lightning_gemini.peers.errors import DuplicateRank, PeerLeft, PeerLost, RendezvousError, StaleGeneration, Unreachable
from lightning_gemini.peers.roster import Address

if TYPE_CHECKING:
    from lightning_gemini.peers.node import PeerNode

_RELAYED = {kind.__name__: kind for kind in (StaleGeneration, PeerLost, Unreachable)}
"""What a rank on the way to a key's owner may have met instead."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.005, 0.5


class Exchange:
    """Something that waits for a post of a peer, and must not wait when its own posts cannot arrive."""

    def __init__(self) -> None:
        self._error: RendezvousError | None = None
        self._waiting: asyncio.Future[Any] | None = None

    async def wait(self, future: asyncio.Future[Any]) -> Any:
        """The future's result, or the error of a post."""
        if self._error is not None:
            raise self._error
        self._waiting = future
        return await future

    def fail(self, error: RendezvousError) -> None:
        """A peer that a post was for cannot be reached any more."""
        self._error = error
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(error)


class Peer:
    """See the module's docstring. Lives in the node's event loop."""

    def __init__(self, node: PeerNode, rank: int, generation: int) -> None:
        self._node, self._rank, self._generation = node, rank, generation
        self._dialler: Dialler | None = None
        self._dialling: asyncio.Task[None] | None = None
        self._limit: asyncio.TimerHandle | None = None
        self._outcome: asyncio.Future[None] | None = None
        """Of the attempt under way."""
        self._kept = b""
        """Frames that no welcome connection has carried."""
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._posts: weakref.WeakSet[Exchange] = weakref.WeakSet()
        self._requests = 0
        self._problem = ""
        """The last thing that went wrong on the way."""

    def dial(self) -> None:
        """Connect, if there is no connection yet."""
        if self._dialler is None and self._dialling is None:
            loop, limit_s = asyncio.get_running_loop(), self._node.timeout_s
            self._dialling = loop.create_task(self._dial())
            self._limit = loop.call_later(max(0.9 * limit_s, limit_s - 1.0), self._too_late)  # earlier than the caller, who knows not why

    def post(self, message: wire.Message, exchange: Exchange) -> None:
        """Say something that needs no answer."""
        self._posts.add(exchange)
        self._say(0, message)

    def call(self, message: wire.Message) -> asyncio.Future[Any]:
        """Ask."""
        self._requests += 1
        self._answers[self._requests] = future = asyncio.get_running_loop().create_future()
        self._say(self._requests, message)
        return future

    def _say(self, number: int, message: wire.Message) -> None:
        frame = wire.frame(wire.encode(wire.Request(number, message)))
        if self._dialler is None or self._outcome is not None:
            self._kept += frame
        if self._dialler is not None:
            self._dialler.say(frame)
        self.dial()

    async def _dial(self) -> None:
        try:
            await self._search()
        except (StaleGeneration, DuplicateRank) as error:
            self._give_up(error)

    def _too_late(self) -> None:
        if self._dialling is not None:
            self._dialling.cancel()
        self._give_up(Unreachable(self._complaint()))
        if self._dialler is not None:
            self._dialler.close("did not answer in time")

    def _stop_dialling(self) -> None:
        self._kept, self._dialling = b"", None
        if self._limit is not None:
            self._limit.cancel()

    async def _search(self) -> None:
        pause, self._problem = _FIRST_PAUSE_S, ""
        while True:
            for address in self._node.roster.addresses[self._rank]:
                self._problem = self._problem or f"{address}: no answer"
                try:
                    return await self._attempt(address)
                except (StaleGeneration, DuplicateRank):
                    raise
                except (OSError, RendezvousError, asyncio.TimeoutError) as error:
                    if not isinstance(error, ConnectionRefusedError) or self._problem.endswith("no answer"):
                        self._problem = f"{address}: {error or type(error).__name__}"
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def _attempt(self, address: Address) -> None:
        self._outcome = asyncio.get_running_loop().create_future()
        try:
            self._dialler = await connect(self._node, self._rank, self._generation, address, self)
            self._dialler.say(self._kept)
            await self._outcome
        except (OSError, RendezvousError):
            self._dialler = None  # it may have ended before it was known here
            raise
        finally:
            self._outcome = None

    def welcomed(self) -> None:
        """Everything kept has been carried."""
        self._stop_dialling()
        if self._outcome is not None and not self._outcome.done():
            self._outcome.set_result(None)

    def answered(self, reply: wire.Reply) -> None:
        """Wake the asker."""
        future = self._answers.pop(reply.id, None)
        if future is None or future.done():
            return
        if reply.error:
            kind, _, text = reply.error.partition(": ")
            future.set_exception(_RELAYED[kind](text) if kind in _RELAYED else RendezvousError(reply.error))
        else:
            future.set_result(reply.value)

    def ended(self, error: RendezvousError) -> None:
        """An attempt failed, or a connection broke."""
        self._dialler = None
        if self._outcome is not None and not self._outcome.done():
            self._outcome.set_exception(error)
        else:
            kind = PeerLeft if isinstance(error, PeerLeft) else PeerLost
            self._give_up(error if isinstance(error, StaleGeneration) else kind(f"rank {self._rank} was lost: {error}"))

    def _give_up(self, error: RendezvousError) -> None:
        self._stop_dialling()
        answers, self._answers = self._answers, {}
        for future in answers.values():
            if not future.done():
                future.set_exception(error)
        for exchange in [] if isinstance(error, PeerLeft) else list(self._posts):
            exchange.fail(error)
        self._posts.clear()

    def close(self) -> None:
        """The generation is over."""
        if self._dialling is not None:
            self._dialling.cancel()
        self._stop_dialling()
        if self._dialler is not None:
            self._dialler.close("the generation is over")

    def _complaint(self) -> str:
        node = self._node
        places = ", ".join(map(str, node.roster.addresses[self._rank]))
        return (
            f"rank {node.rank} could not reach rank {self._rank} of job {node.roster.job!r} within {node.timeout_s:g} s (tried {places}; "
            f"last problem: {self._problem}). Is that process running, and is its host's name right?"
        )
