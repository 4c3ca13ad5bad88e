"""Which TCP sockets a process has, from /proc; used by tests and by the scripts they start."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Socket:
    """A line of /proc/net/tcp."""

    local: int
    """Port."""
    remote: int
    """Port; 0 of a listener."""
    listens: bool
    address: str
    """Of the local end, in the kernel's hexadecimal."""


def tcp_sockets(pid: int | str = "self") -> list[Socket]:
    """All TCP sockets of a process, of either family."""
    own = _inodes(pid)
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]]
    return [_socket(words) for words in lines if words[9] in own]


def uses(port: int, pid: int | str = "self") -> bool:
    """Whether a process listens on a port, or is connected to or from it."""
    return any(port in (sock.local, sock.remote) for sock in tcp_sockets(pid))


def _inodes(pid: int | str) -> set[str]:
    found = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(fd)
        except FileNotFoundError:  # closed meanwhile
            continue
        if target.startswith("socket:["):
            found.add(target[8:-1])
    return found


def _socket(words: list[str]) -> Socket:
    address, _, port = words[1].partition(":")
    return Socket(int(port, 16), int(words[2].partition(":")[2], 16), words[3] == "0A", address)
