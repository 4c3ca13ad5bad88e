"""Connect to another agent and prove each other.

Seam: `dial` returns a socket on which both ends have proved that they know the job's token, and are in the same generation; or raises
`OSError` (gone, silent), `StaleGeneration` (a newer generation has begun there or here), `WrongPeer` (another job, version, node or token).
A listener that is in an older generation answers when it has begun this one: the deadline covers that too.
"""

from __future__ import annotations

import contextlib
import socket
import time

import msgspec

from lightning_gemini.peers import wire
from lightning_gemini.peers.errors import StaleGeneration, WrongPeer
from lightning_gemini.replication import messages
from lightning_gemini.replication.fence import Fence, Peer

CONNECT_S = 3.0
HANDSHAKE_S = 10.0
"""How long a connection may stay unproved."""


class _Call:
    """A socket on its way, which the fence can end."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self.sock, self._deadline = sock, deadline

    def shut(self) -> None:
        """See `fence.Shuttable`."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def frame(self) -> bytes:
        """The next frame of the handshake."""
        size = int.from_bytes(self._exactly(4), "big")
        if size > wire.MAX_STRANGER_BYTES:
            raise WrongPeer(f"whatever listens there announced a frame of {size} bytes")
        return self._exactly(size)

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            self.sock.settimeout(max(0.001, self._deadline - time.monotonic()))
            part = self.sock.recv(count - len(data))
            if not part:
                raise ConnectionResetError("the other end has closed the connection")
            data += part
        return data


def dial(peer: Peer, words: messages.Hello, token: bytes, fence: Fence, limit_s: float = HANDSHAKE_S) -> socket.socket:
    """A proved connection; see the module's docstring. The nonce and the mac of `words` are filled in here."""
    sock = socket.socket(socket.AF_INET6 if ":" in peer.host else socket.AF_INET, socket.SOCK_STREAM)
    call = _Call(sock, time.monotonic() + limit_s)
    try:
        fence.admit(call, words.generation)
        sock.settimeout(min(CONNECT_S, limit_s))
        sock.connect((peer.host, peer.port))
        _prove(call, words, token)
    except BaseException:
        fence.leave(call)
        sock.close()
        raise
    fence.leave(call)
    sock.settimeout(None)
    return sock


def _prove(call: _Call, words: messages.Hello, token: bytes) -> None:
    challenge = _heard(call)
    if not isinstance(challenge, wire.Challenge):
        raise WrongPeer("whatever listens there asks for no proof")
    words = msgspec.structs.replace(words, nonce=wire.nonce())
    words.mac = messages.hello_mac(token, words, challenge.nonce)
    call.sock.sendall(messages.frame(words))
    match _heard(call):
        case wire.Refusal("stale", text):
            raise StaleGeneration(text)
        case wire.Refusal(_, text):
            raise WrongPeer(text)
        case wire.Welcome(mac) if wire.same(mac, messages.welcome_mac(token, words, challenge.nonce)):
            return
    raise WrongPeer("whatever listens there does not know the job's token")


def _heard(call: _Call) -> wire.Challenge | wire.Welcome | wire.Refusal:
    try:
        return wire.from_listener.decode(call.frame())
    except msgspec.DecodeError as error:
        raise WrongPeer(f"whatever listens there sent what is no message of ours ({error})") from None
