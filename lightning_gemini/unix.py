"""Who is at the other end of a unix socket: the kernel vouches for it."""

from __future__ import annotations

import os
import socket
import struct


def other_user(sock: socket.socket) -> int | None:
    """The user of the process at the other end, if it is neither ours nor root. None otherwise, and for other kinds of socket."""
    if sock.family != socket.AF_UNIX:
        return None
    _, user, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return user if user not in (os.geteuid(), 0) else None
