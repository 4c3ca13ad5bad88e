"""The two ends of a connection between ranks: `Dialler` asks, `Listener` answers (see `wire` for what they say).

Two ranks that ask each other have two connections, so that no order of set-up can deadlock. Requests may follow the Hello at once: a
listener that refuses never looks at them, and one that accepts says so before it answers, so nothing is done twice and no answer of an
impostor is believed.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

import msgspec

from lightning_gemini.peers import wire
from lightning_gemini.peers.errors import DuplicateRank, PeerLeft, PeerLost, RendezvousError, StaleGeneration, WrongPeer
from lightning_gemini.peers.framing import Framed
from lightning_gemini.unix import other_user

log = logging.getLogger(__name__)

_REFUSALS: dict[str, type[RendezvousError]] = {"stale": StaleGeneration, "duplicate": DuplicateRank}


class Owner(Protocol):
    """Who dialled."""

    def welcomed(self) -> None:
        """The peer is who it should be, and takes requests."""

    def answered(self, reply: wire.Reply) -> None:
        """A reply."""

    def ended(self, error: RendezvousError) -> None:
        """The connection is over; called once."""


class Dialler(Framed):
    """The end that asks."""

    def __init__(self, sock: socket.socket, token: bytes, hello: wire.Hello, owner: Owner) -> None:
        self._token, self._hello, self._owner = token, hello, owner
        self._challenge = b""
        self._greeted = self._welcome = False
        self._after_hello = b""
        self._error: RendezvousError | None = None
        super().__init__(sock)
        if not token:
            self._greet()

    def say(self, frames: bytes) -> None:
        """Send requests, after the Hello."""
        if self._greeted:
            self.send_raw(frames)
        else:
            self._after_hello += frames

    def _greet(self) -> None:
        self._hello = msgspec.structs.replace(self._hello, mac=wire.hello_mac(self._token, self._hello, self._challenge))
        self._greeted = True
        self.send_raw(wire.frame(wire.encode(self._hello)) + self._after_hello)

    def frame(self, body: bytes) -> None:
        """A reply, or the handshake."""
        if self._welcome:
            return self._take(wire.reply.decode(body))
        match wire.from_listener.decode(body):
            case wire.Challenge(nonce):
                if self._greeted:
                    return self.fail("asks for a proof of a token that this process does not have")
                self._challenge = nonce
                self._greet()
            case wire.Refusal(kind, text):
                self._error = _REFUSALS.get(kind, WrongPeer)(text)
                self.close(text)
            case wire.Welcome(mac):
                if not wire.same(mac, wire.welcome_mac(self._token, self._hello, self._challenge)):
                    return self.fail("does not know the job's token")
                self._welcome = True
                self.proved()
                self._owner.welcomed()

    def _take(self, reply: wire.Reply) -> None:
        if reply.id == wire.GOOD_BYE:
            self._error = PeerLeft(reply.error) if reply.value else StaleGeneration(reply.error)
            return self.close(reply.error)
        self._owner.answered(reply)

    def fail(self, why: str) -> None:
        """It is no peer of ours."""
        self._error = WrongPeer(f"whatever listens there {why}")
        self.close(why)

    def lost(self, why: str) -> None:
        """The peer is gone."""
        self._owner.ended(self._error or PeerLost(f"the connection broke: {why}"))


class Listener(Framed):
    """The end that answers. `admit` decides about a proved Hello (a Refusal, or None); `serve` answers requests."""

    def __init__(
        self,
        sock: socket.socket,
        token: bytes,
        admit: Callable[[wire.Hello], Awaitable[wire.Refusal | None]],
        serve: Callable[[wire.Message, int], Awaitable[Any] | None],
        gone: Callable[[Listener], None],
    ) -> None:
        super().__init__(sock)
        self._token, self._admit, self._serve, self._gone = token, admit, serve, gone
        self._challenge = wire.nonce() if token else b""
        self._hello: wire.Hello | None = None
        self._early: list[bytes] | None = []
        """Requests that arrived before the peer was admitted."""
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def generation(self) -> int | None:
        """Of the peer, once it has proved itself."""
        return None if self._hello is None else self._hello.generation

    def begin(self) -> None:
        """Start the handshake."""
        if (stranger := other_user(self.sock)) is not None:
            return self.fail(f"belongs to user {stranger}")
        if self._token:
            self.send(wire.Challenge(self._challenge))
        self.read()  # most often the Hello of a peer without a token has arrived with the connection

    def frame(self, body: bytes) -> None:
        """A request, or the handshake."""
        if self._hello is None:
            hello = wire.from_dialler.decode(body)
            if not wire.same(hello.mac, wire.hello_mac(self._token, hello, self._challenge)):
                self.send(wire.Refusal("unproved", "the job's token is another one"))
                return self.fail("could not prove that it knows the job's token")
            self._hello = hello
            self.proved()
            self._start(self._welcome(hello))
        elif self._early is not None:
            self._early.append(body)
        else:
            self._request(self._hello.rank, body)

    def _request(self, asker: int, body: bytes) -> None:
        request = wire.request.decode(body)
        answer = self._serve(request.message, asker)
        if answer is not None:
            self._start(self._answer(request.id, answer))

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _welcome(self, hello: wire.Hello) -> None:
        refusal = await self._admit(hello)
        if refusal is not None:
            self.send(refusal)
            return self.close("refused")
        self.send(wire.Welcome(wire.welcome_mac(self._token, hello, self._challenge)))
        early, self._early = self._early, None
        for body in early or ():
            if not self.closed:
                self.understand(body)

    async def _answer(self, number: int, answer: Awaitable[Any]) -> None:
        try:
            reply = wire.Reply(number, await answer)
        except Exception as error:  # whatever it is, the asker must not wait for ever
            reply = wire.Reply(number, None, f"{type(error).__name__}: {error}")
        self.send(reply)

    def dismiss(self, why: str, *, leaving: bool = False) -> None:
        """End it in good order: whoever waits for an answer learns why, and not just that it will have none."""
        if self._hello is not None and self._early is None:
            self.send(wire.Reply(wire.GOOD_BYE, leaving, why))
        self.close(why)

    def fail(self, why: str) -> None:
        """End it, with one line in the log."""
        if not self.closed:
            log.warning("closed the connection of %s: it %s", _name(self.sock), why)
        self.close(why)

    def lost(self, why: str) -> None:
        """Nobody waits for its requests any more."""
        self._gone(self)
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()


def _name(sock: socket.socket) -> str:
    try:
        peer = sock.getpeername()
    except OSError:
        return "a peer that is gone"
    return f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else "a process of this node"
