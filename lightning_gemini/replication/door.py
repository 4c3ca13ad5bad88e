"""Where other agents knock: one listening socket, one thread, and a handshake that costs a stranger more than us.

Seam: `Door(sock, admit, …)`; `admit(hello)` decides about a proved Hello: a Refusal, True (welcome it) or False (keep it waiting);
`hand(sock, hello)` gets the welcomed one; `look_again` when a new generation has begun. `close` joins the thread.

States of a caller: challenged -> proved -> welcomed or refused. A proved caller of a newer generation waits at the door until this node has
begun that one too, so nobody has to try again. A stranger has `HANDSHAKE_S` and one small frame; when too many stand there, the oldest
goes. Failure: whatever a caller does ends its own connection, with one line of news. No room for a descriptor -> the next try is in a
second.
"""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable

import msgspec

from lightning_gemini.peers import wire
from lightning_gemini.replication import messages
from lightning_gemini.replication.dial import HANDSHAKE_S

_MAX_STRANGERS = 256
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_NO_ROOM_S = 1.0
_JOIN_S = 5.0


class _Caller:
    """A connection that was not welcomed yet."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        self.sock, self.name = sock, name
        self.challenge = wire.nonce()
        self.received = b""
        self.hello: messages.Hello | None = None
        self.deadline = time.monotonic() + HANDSHAKE_S


class Door:
    """See the module's docstring."""

    def __init__(
        self,
        server: socket.socket,
        token: bytes,
        admit: Callable[[messages.Hello], wire.Refusal | bool],
        hand: Callable[[socket.socket, messages.Hello], None],
        news: Callable[[str], None],
    ) -> None:
        self._server, self._token, self._admit, self._hand, self._news = server, token, admit, hand, news
        server.setblocking(False)
        self._callers: dict[int, _Caller] = {}
        self._again_at: float | None = None
        """When there was no room: when to accept again."""
        self._closing = False
        self._signal = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector = selectors.DefaultSelector()
        self._selector.register(server, selectors.EVENT_READ)
        self._selector.register(self._signal, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="lightning-gemini-door", daemon=True)
        self._thread.start()

    def look_again(self) -> None:
        """Another generation has begun: decide about those who wait."""
        os.eventfd_write(self._signal, 1)

    def close(self) -> None:
        """Stop listening, turn everybody away, join the thread."""
        self._closing = True
        self.look_again()
        self._thread.join(_JOIN_S)
        for caller in self._callers.values():
            caller.sock.close()
        self._selector.close()
        self._server.close()
        os.close(self._signal)

    # ---- the door's thread

    def _run(self) -> None:
        while not self._closing:
            for key, _ in self._selector.select(self._wait_s()):
                if key.fileobj is self._server:
                    self._accept()
                elif key.fd == self._signal:
                    os.eventfd_read(self._signal)
                    self._look_again()
                elif (caller := self._callers.get(key.fd)) is not None and caller is key.data:  # else turned away a moment ago
                    self._read(caller)
            self._end_of_patience()

    def _wait_s(self) -> float | None:
        times = [caller.deadline for caller in self._callers.values() if caller.hello is None]
        times += [self._again_at] if self._again_at is not None else []
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _end_of_patience(self) -> None:
        now = time.monotonic()
        for caller in [caller for caller in self._callers.values() if caller.hello is None and caller.deadline <= now]:
            self._turn_away(caller, "has not proved itself in time")
        if self._again_at is not None and self._again_at <= now:
            self._again_at = None
            self._selector.register(self._server, selectors.EVENT_READ)

    def _accept(self) -> None:
        try:
            sock, address = self._server.accept()
        except OSError as error:
            if error.errno in _NO_ROOM:
                self._news(f"no connection can be taken ({error.strerror}): the next try is in {_NO_ROOM_S:g} s")
                self._selector.unregister(self._server)
                self._again_at = time.monotonic() + _NO_ROOM_S
            return  # else: a caller that has gone again
        strangers = [caller for caller in self._callers.values() if caller.hello is None]
        if len(strangers) >= _MAX_STRANGERS:
            self._turn_away(strangers[0], f"was the oldest of {len(strangers)} that had not proved themselves")
        sock.setblocking(False)
        caller = self._callers[sock.fileno()] = _Caller(sock, f"{address[0]}:{address[1]}")
        self._selector.register(sock, selectors.EVENT_READ, caller)
        self._say(caller, wire.Challenge(caller.challenge))

    def _read(self, caller: _Caller) -> None:
        try:
            data = caller.sock.recv(wire.MAX_STRANGER_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            return self._forget(caller)
        if caller.hello is not None:
            return self._turn_away(caller, "spoke before it was welcomed")
        caller.received += data
        self._understand(caller)

    def _understand(self, caller: _Caller) -> None:
        if len(caller.received) < 4:
            return
        size = int.from_bytes(caller.received[:4], "big")
        if size > wire.MAX_STRANGER_BYTES:
            return self._turn_away(caller, f"announced a frame of {size} bytes, {wire.MAX_STRANGER_BYTES} are allowed")
        if len(caller.received) < 4 + size:
            return
        if len(caller.received) > 4 + size:
            return self._turn_away(caller, "spoke before it was welcomed")
        try:
            words = messages.hello.decode(caller.received[4:])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return self._turn_away(caller, f"sent what is no message of ours ({error})")
        if not wire.same(words.mac, messages.hello_mac(self._token, words, caller.challenge)):
            self._say(caller, wire.Refusal("unproved", "the job's token is another one"))
            return self._turn_away(caller, "could not prove that it knows the job's token")
        caller.hello = words
        self._decide(caller, words)

    def _decide(self, caller: _Caller, words: messages.Hello) -> None:
        answer = self._admit(words)
        if isinstance(answer, wire.Refusal):
            self._say(caller, answer)
            self._turn_away(caller, f"was refused: {answer.text}")
        elif answer and self._say(caller, wire.Welcome(messages.welcome_mac(self._token, words, caller.challenge))):
            self._remove(caller)
            self._hand(caller.sock, words)

    def _look_again(self) -> None:
        for caller in list(self._callers.values()):
            if caller.hello is not None:
                self._decide(caller, caller.hello)

    def _say(self, caller: _Caller, message: msgspec.Struct) -> bool:
        """All of it at once: it is small, and the first or second thing that this socket is given."""
        with contextlib.suppress(OSError):
            data = messages.frame(message)
            if caller.sock.send(data) == len(data):
                return True
        self._forget(caller)
        return False

    def _turn_away(self, caller: _Caller, why: str) -> None:
        if caller.sock.fileno() >= 0:
            self._news(f"closed the connection of {caller.name}: it {why}")
            self._forget(caller)

    def _forget(self, caller: _Caller) -> None:
        if caller.sock.fileno() >= 0:
            self._remove(caller)
            caller.sock.close()

    def _remove(self, caller: _Caller) -> None:
        self._selector.unregister(caller.sock)
        del self._callers[caller.sock.fileno()]
