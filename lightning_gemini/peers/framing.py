"""Frames over one non-blocking socket, in the event loop.

Raw sockets and `add_reader`, not asyncio's transports: a rendezvous is many short connections at once, and a transport costs several
turns of the loop for each. States: open -> closed, once, for one reason, which `lost` is told. Whatever a peer sends can end its own
connection only.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

import msgspec

from lightning_gemini.forks import not_in_children
from lightning_gemini.peers import wire

HANDSHAKE_S = 10.0
"""How long a connection may stay unproved."""
_READ_BYTES = 256 << 10


class Framed:
    """One end of a connection. Subclasses say what a frame means and what follows from the end."""

    def __init__(self, sock: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self.sock = sock
        not_in_children(sock)
        self.limit = wire.MAX_STRANGER_BYTES
        self.closed = False
        self._received = bytearray()
        self._unsent = bytearray()
        self._deadline = self._loop.call_later(HANDSHAKE_S, self.fail, "has not proved itself in time")
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._fd = sock.fileno()  # asyncio is given the number: looking up a socket object costs system calls
        self._writing = False
        self._loop.add_reader(self._fd, self.read)

    def proved(self) -> None:
        """The handshake is over."""
        self.limit = wire.MAX_BYTES
        self._deadline.cancel()

    def send(self, *messages: msgspec.Struct) -> None:
        """Send frames, or queue what the socket does not take."""
        self.send_raw(b"".join(wire.frame(wire.encode(message)) for message in messages))

    def send_raw(self, data: bytes) -> None:
        """Send whole frames."""
        if self.closed:
            return
        waiting = bool(self._unsent)
        self._unsent += data
        if not waiting:
            self._write()

    def _write(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: self.sock.send(self._unsent)]
        except BlockingIOError:
            if not self._writing:
                self._writing = True
                self._loop.add_writer(self._fd, self._write)
        except OSError as error:
            self.read()  # what the peer said before it closed tells why
            self.close(error.strerror or str(error))
        else:
            self._stop_writing()

    def _stop_writing(self) -> None:
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._fd)

    def read(self) -> None:
        """Take what has arrived."""
        if self.closed:
            return
        try:
            data = self.sock.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            return self.close(error.strerror or str(error))
        self._received += data
        self._cut()
        if not data:
            self.close("closed by the peer")

    def _cut(self) -> None:
        while len(self._received) >= 4 and not self.closed:
            end = 4 + int.from_bytes(self._received[:4], "big")
            if end - 4 > self.limit:
                return self.fail(f"announced a frame of {end - 4} bytes, {self.limit} are allowed")
            if len(self._received) < end:
                return
            body = bytes(self._received[4:end])
            del self._received[:end]
            self.understand(body)

    def understand(self, body: bytes) -> None:
        """One frame; what cannot be understood ends the connection."""
        try:
            self.frame(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self.fail(f"sent what is no message of ours ({error})")

    def frame(self, body: bytes) -> None:
        """One frame."""
        raise NotImplementedError

    def fail(self, why: str) -> None:
        """The peer did what it must not."""
        raise NotImplementedError

    def lost(self, why: str) -> None:
        """The connection is closed; called once."""
        raise NotImplementedError

    def close(self, why: str) -> None:
        """End the connection."""
        if self.closed:
            return
        self.closed = True
        self._deadline.cancel()
        self._loop.remove_reader(self._fd)
        self._stop_writing()
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()
        self.lost(why)
