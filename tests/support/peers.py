"""Peers of a rendezvous within one process (each has a loop and a listener of its own), and what can stand in their way."""

from __future__ import annotations

import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from lightning_gemini.peers import wire
from lightning_gemini.peers.node import PeerNode
from lightning_gemini.peers.roster import Address, Roster

T = TypeVar("T")
LIMIT_S = 20.0


def new_job() -> str:
    """A name that no other test has: abstract unix sockets and derived ports are the whole machine's."""
    return f"test-{uuid.uuid4().hex}"


class Peers:
    """The nodes that a test has started."""

    def __init__(self) -> None:
        self.nodes: list[PeerNode] = []

    def start(self, roster: Roster, rank: int, **options: Any) -> PeerNode:
        """One more."""
        options.setdefault("timeout_s", LIMIT_S)
        self.nodes.append(PeerNode(roster, rank, **options))
        return self.nodes[-1]

    def world(self, size: int, **options: Any) -> list[PeerNode]:
        """All ranks of a new job of one node."""
        roster = Roster.on_one_node(new_job(), size)
        return [self.start(roster, rank, **options) for rank in range(size)]

    def tcp(self, size: int, host: str = "127.0.0.1", **options: Any) -> list[PeerNode]:
        """The same over TCP."""
        roster = Roster.on_hosts(new_job(), [host], size)
        return [self.start(roster, rank, **options) for rank in range(size)]

    def close(self) -> None:
        """Close them."""
        for node in self.nodes:
            node.close()


def at_once(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Results of calls that need each other, each in a thread of its own; every call has a deadline of its own."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def until(condition: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    """Wait for something that gives no sign."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


def gather(nodes: Sequence[PeerNode], name: str = "all", generation: int = 0) -> list[list[bytes]]:
    """What each node gets from an all-gather of all."""
    size = len(nodes)

    def one(node: PeerNode) -> Callable[[], list[bytes]]:
        return lambda: node.all_gather(generation, name, node.rank, size, b"%d" % node.rank)

    return at_once([one(node) for node in nodes])


def assert_works(nodes: Sequence[PeerNode], name: str = "works", generation: int = 0) -> None:
    """Everyone hears of everyone."""
    assert gather(nodes, name, generation) == [[b"%d" % node.rank for node in nodes]] * len(nodes)


def hello(node: PeerNode, rank: int, challenge: bytes = b"", token: bytes = b"", **other: Any) -> wire.Hello:
    """A Hello for `node` of somebody who says to be `rank`."""
    said = {"job": node.roster.job, "generation": 0, "rank": rank, "to": node.rank, "process": wire.nonce(), "nonce": wire.nonce(), **other}
    words = wire.Hello(**said)
    words.mac = wire.hello_mac(token, words, challenge)
    return words


def connect(address: Address) -> socket.socket:
    """A stranger's connection."""
    if address.is_unix:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect("\0" + address.host)
    else:
        sock = socket.create_connection((address.host, address.port))
    sock.settimeout(LIMIT_S)
    return sock


def receive(sock: socket.socket) -> bytes:
    """The body of one frame; nothing if the other end has closed."""
    head = _exactly(sock, 4)
    return _exactly(sock, int.from_bytes(head, "big")) if head else b""


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        try:
            part = sock.recv(count - len(data))
        except ConnectionResetError:
            part = b""
        if not part:
            return b""
        data += part
    return data


class Stranger:
    """Has taken an address before the peers came. `treat` is what it does with each caller."""

    def __init__(self, address: Address, treat: Callable[[socket.socket], None]) -> None:
        self.calls = 0
        self._treat = treat
        self._server = socket.create_server((address.host, address.port))
        self._kept: list[socket.socket] = []
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()

    def _answer(self) -> None:
        while True:
            try:
                caller, _ = self._server.accept()
            except OSError:  # closed
                return
            self.calls += 1
            caller.settimeout(LIMIT_S)
            self._kept.append(caller)
            try:
                self._treat(caller)
            except OSError:
                continue  # the caller would not have it

    def close(self) -> None:
        """Leave the address."""
        self._server.shutdown(socket.SHUT_RDWR)
        for caller in self._kept:
            caller.close()
        self._thread.join(LIMIT_S)
        self._server.close()
