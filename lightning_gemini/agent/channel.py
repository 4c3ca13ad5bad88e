"""One end of the control connection between a rank and its agent: a `SOCK_SEQPACKET` pair.

States: open, closed. The kernel keeps datagram borders and reports the peer's death as end of file, whatever killed it. A send to a
peer that does not read waits until its deadline, then raises `BlockingIOError`; a send to a dead peer raises `BrokenPipeError`.
"""

from __future__ import annotations

import socket
import struct

MAX_BYTES = 1 << 20
"""Largest datagram. Control messages are small; state never travels here."""
_SEND_TIMEOUT_S = 5


class Channel:
    """Datagrams in both directions. Datagrams are atomic, so several threads may send; one receives."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_TIMEOUT_S, 0))
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, MAX_BYTES)

    @classmethod
    def pair(cls) -> tuple[Channel, socket.socket]:
        """The agent's end as a channel, and the raw end that the child inherits."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(ours), theirs

    def fileno(self) -> int:
        """For selectors."""
        return self.sock.fileno()

    def send(self, data: bytes) -> None:
        """Send one datagram."""
        self.sock.send(data)

    def receive(self, *, wait: bool) -> bytes | None:
        """The next datagram, or None at end of file. Without `wait`, raises `BlockingIOError` when there is none."""
        try:
            return self.sock.recv(MAX_BYTES, 0 if wait else socket.MSG_DONTWAIT) or None
        except ConnectionResetError:
            return None

    def close(self) -> None:
        """Close this end; the peer sees end of file."""
        self.sock.close()
