"""Agents that exchange snapshots: several in one process, or one in each of several; and arenas with known bytes."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from lightning_gemini.replication.exchange import Exchange
from lightning_gemini.replication.fence import Peer
from lightning_gemini.snapshot import blocks
from lightning_gemini.snapshot.manifest import Manifest, Segment, encode
from lightning_gemini.snapshot.slots import Slot, SlotFile

LIMIT_S = 30.0
CHUNK = 64 << 10
TOKEN = b"the secret of this job"


def random_bytes(size: int, seed: object) -> bytes:
    """The same for the same seed."""
    return random.Random(str(seed)).randbytes(size)


class Arena:
    """A rank's arena. `write` commits a snapshot as the rank's process would."""

    def __init__(self, capacity: int = 0) -> None:
        self.fd = os.memfd_create("test-arena", os.MFD_CLOEXEC)
        self.file = SlotFile(self.fd)
        if capacity:
            self.file.allocate(capacity)

    def write(self, step: int, travel: bytes, shared: bytes = b"", *, key: str = "", chunk: int = CHUNK, local: bytes = b"") -> bytes:
        """Returns the payload."""
        segments = [Segment(name, (len(data),), "uint8", "", 0, len(data)) for name, data in (("t", travel), ("s", shared)) if data]
        head = encode(Manifest(segments, local, 1 if travel else 0, key))
        payload, cut_at = head + travel + shared, len(head) + len(travel)
        if blocks.size_of_slot(len(payload), cut_at, chunk) > self.file.capacity:
            self.file.allocate(blocks.size_of_slot(len(payload), cut_at, chunk))
        place = self.file.begin()
        with self.file.payload(place) as view:
            view[: len(payload)] = payload
            digests = [blocks.digest(view[start : start + size]) for start, size in blocks.cut(len(payload), cut_at, chunk)]
        blocks.seal(self.file, place, step=step, kind=0, length=len(payload), trailer=blocks.Trailer(chunk, cut_at, digests))
        return payload

    def flip(self, step: int, position: int) -> None:
        """Damage a byte of a committed snapshot."""
        slot = self.slot(step)
        with self.file.payload(slot.place) as view:
            view[position] ^= 0xFF

    def slot(self, step: int) -> Slot:
        found = self.file.find(step)
        assert found is not None, f"no snapshot of step {step}"
        return found

    def close(self) -> None:
        self.file.close()
        os.close(self.fd)


def verified(file: SlotFile, step: int) -> bytes:
    """The payload of a step, after all its checksums were found right."""
    slot = file.find(step)
    assert slot is not None, f"no snapshot of step {step}"
    blocks.verify(file, slot)
    with file.payload(slot.place) as view:
        return bytes(view[: slot.length])


class Seen:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.replicated: list[tuple[int, int, int]] = []
        self.failed: list[tuple[int, int, int, str]] = []
        self.controls: list[tuple[int, str, socket.socket]] = []
        self.news: list[str] = []

    def on_replicated(self, rank: int, step: int, index: int) -> None:
        self.replicated.append((rank, step, index))

    def on_failed(self, rank: int, step: int, index: int, why: str) -> None:
        self.failed.append((rank, step, index, why))

    def on_control(self, index: int, node: str, sock: socket.socket) -> None:
        self.controls.append((index, node, sock))

    def on_news(self, text: str) -> None:
        self.news.append(text)


class Agent:
    """An exchange with its observer and its ranks' arenas."""

    def __init__(self, job: str, node: str, *, token: bytes = TOKEN, host: str = "127.0.0.1") -> None:
        self.node, self.host, self.seen = node, host, Seen()
        self.exchange = Exchange(job=job, token=token, node=node, host=host, observer=self.seen)
        self.arenas: dict[int, Arena] = {}

    @property
    def peer(self) -> Peer:
        return Peer(self.node, self.host, self.exchange.port)

    def arena(self, rank: int, capacity: int = 0) -> Arena:
        """A new arena of a rank of this node, held by the exchange."""
        if rank in self.arenas:
            self.arenas[rank].close()
        self.arenas[rank] = Arena(capacity)
        self.exchange.hold({number: arena.fd for number, arena in self.arenas.items()})
        return self.arenas[rank]

    def until(self, condition: Callable[[], Any], limit_s: float = LIMIT_S) -> None:
        """Poll, as the agent's loop does, until something is so."""
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, f"it did not happen: {vars(self.seen)}"
            select.select([self.exchange.fileno()], [], [], 0.02)
            self.exchange.poll()

    def replicate(self, rank: int, step: int, index: int) -> None:
        """Send, and wait for the acknowledgement."""
        self.exchange.send(rank, step, [index])
        self.until(lambda: (rank, step, index) in self.seen.replicated)

    def replica(self, rank: int, step: int) -> bytes:
        """The verified bytes of a replica kept here."""
        found = self.exchange._store.find(rank, step)
        assert found is not None, f"no replica of rank {rank}, step {step}: {self.exchange.replicas()}"
        return verified(found[0], step)

    def close(self) -> None:
        self.exchange.close()
        for _, _, sock in self.seen.controls:
            sock.close()
        for arena in self.arenas.values():
            arena.close()


Hear = Callable[[], str]
Tell = Callable[[object], None]


class Child:
    """A forked process that is told lines and tells lines."""

    def __init__(self, body: Callable[[Hear, Tell], None]) -> None:
        theirs_in, self._in = os.pipe()
        self._out, theirs_out = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                signal.alarm(60)
                body(lambda: _line(theirs_in), lambda text: _write(theirs_out, text))
            except BaseException:
                _write(theirs_out, traceback.format_exc())
            finally:
                os._exit(0)
        os.close(theirs_in)
        os.close(theirs_out)

    def tell(self, text: object) -> None:
        _write(self._in, text)

    def hear(self) -> str:
        return _line(self._out)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def end(self) -> None:
        self.kill()
        os.waitpid(self.pid, 0)
        os.close(self._in)
        os.close(self._out)


def _line(fd: int) -> str:
    text = b""
    while not text.endswith(b"\n"):
        part = os.read(fd, 1)
        assert part, f"it has ended: {text.decode()}"
        text += part
    return text.decode().strip()


def _write(fd: int, text: object) -> None:
    os.write(fd, f"{text}\n".encode())


Tamper = Callable[[bytearray], None]
"""Changes what passes from the dialler to the listener, or back, in place."""


def untouched(data: bytearray) -> None:
    """Pass it on as it is."""


MARK = b"\xab" * 64


def damage(times: int) -> Tamper:
    """Change a byte of the first `times` pieces in which a block of marked bytes passes, one for each block at most."""
    left = [times]

    def tamper(data: bytearray) -> None:
        place = data.find(MARK)
        if place >= 0 and left[0]:
            left[0] -= 1
            data[place + 20] ^= 1

    return tamper


class Proxy:
    """Stands between a dialler and the agent at `port`. `listen` may come later than its address is given out."""

    def __init__(self, port: int, forth: Tamper = untouched, back: Tamper = untouched, *, listen: bool = True) -> None:
        self._to, self._forth, self._back = port, forth, back
        self._server = socket.socket()
        self._server.bind(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        if listen:
            self.listen()

    def listen(self) -> None:
        self._server.listen()
        self._start(self._accept)

    def _start(self, work: Callable[..., None], *arguments: Any) -> None:
        self._threads.append(threading.Thread(target=work, args=arguments))
        self._threads[-1].start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:  # closed
                return
            far = socket.create_connection(("127.0.0.1", self._to))
            self._ends += [near, far]
            self._start(self._pump, near, far, self._forth)
            self._start(self._pump, far, near, self._back)

    def _pump(self, source: socket.socket, target: socket.socket, tamper: Tamper) -> None:
        with contextlib.suppress(OSError):
            while data := bytearray(source.recv(1 << 16)):
                tamper(data)
                target.sendall(data)
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """End the connections."""
        for sock in self._ends:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.cut()
        for thread in self._threads:
            thread.join(LIMIT_S)
        for sock in self._ends:
            sock.close()


class Cluster:
    """Agents of one job in this process."""

    def __init__(self) -> None:
        self.job = f"test-{uuid.uuid4().hex}"
        self.agents: list[Agent] = []
        self.all: list[Agent] = []
        self.proxies: list[Proxy] = []

    def add(self, **options: Any) -> Agent:
        """One more agent, not in a roster yet."""
        self.all.append(Agent(self.job, f"node-{len(self.all)}-{uuid.uuid4().hex[:4]}", **options))
        return self.all[-1]

    def start(self, count: int, **options: Any) -> list[Agent]:
        """Agents in a roster of generation 0."""
        self.agents = [self.add(**options) for _ in range(count)]
        self.open(0)
        return self.agents

    def open(self, generation: int, agents: Sequence[Agent] | None = None) -> None:
        """Begin a generation on all of its members."""
        self.agents = list(agents or self.agents)
        for index, agent in enumerate(self.agents):
            agent.exchange.open(generation, self.peers(), index)

    def peers(self) -> dict[int, Peer]:
        """The roster."""
        return {index: agent.peer for index, agent in enumerate(self.agents)}

    def behind(self, index: int, *tampers: Tamper, listen: bool = True) -> Peer:
        """An agent, to be reached through a proxy."""
        self.proxies.append(Proxy(self.agents[index].exchange.port, *tampers, listen=listen))
        return self.agents[index].peer._replace(port=self.proxies[-1].port)

    def close(self) -> None:
        for proxy in self.proxies:
            proxy.close()
        for agent in self.all:
            agent.close()
