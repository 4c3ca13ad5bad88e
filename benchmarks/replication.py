"""Replicas on another node and back: seconds and CPU seconds with checksums, between processes over loopback, beside bare sockets.

Each end is a process of its own, as agents are. A snapshot of 512 MiB is captured (copied and hashed block by block, as a rank does),
replicated to the other process, acknowledged, and fetched back into an arena of a third one, from one source and from two.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import msgspec

from benchmarks.common import MIB, Check, Report, main, progress
from lightning_gemini.replication.exchange import Exchange
from lightning_gemini.replication.fence import Peer
from lightning_gemini.replication.refill import Want
from lightning_gemini.snapshot import blocks
from lightning_gemini.snapshot.manifest import Manifest, Segment, encode
from lightning_gemini.snapshot.slots import SlotFile

CHUNK = MIB
_LIMIT_S = 300
_GIB = 1 << 30


class _Observer:
    """Counts."""

    def __init__(self) -> None:
        self.replicated: list[tuple[int, int, int]] = []

    def on_replicated(self, rank: int, step: int, index: int) -> None:
        self.replicated.append((rank, step, index))

    def on_failed(self, rank: int, step: int, index: int, why: str) -> None:
        raise RuntimeError(why)

    def on_control(self, index: int, node: str, sock: socket.socket) -> None:
        sock.close()

    def on_news(self, text: str) -> None:
        progress(text)


class Process:
    """A forked process that does what it is asked, one thing at a time; messages over a pair of sockets."""

    def __init__(self, body: Callable[[socket.socket], None]) -> None:
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                signal.alarm(_LIMIT_S)
                self._sock.close()
                body(theirs)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        theirs.close()

    def begin(self, *words: Any) -> None:
        """Ask for something."""
        self._sock.send(msgspec.msgpack.encode(words))

    def end(self) -> Any:
        """What came of it."""
        data = self._sock.recv(1 << 16)
        if not data:
            raise RuntimeError("a process has failed")
        return msgspec.msgpack.decode(data)

    def ask(self, *words: Any) -> Any:
        """Both."""
        self.begin(*words)
        return self.end()

    def close(self) -> None:
        """End it."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._sock.close()


def _serve(sock: socket.socket, actions: dict[str, Callable[..., Any]]) -> None:
    while data := sock.recv(1 << 16):
        name, *words = msgspec.msgpack.decode(data)
        sock.send(msgspec.msgpack.encode(actions[name](*words)))


class Agent:
    """One node in a process: what `_serve` can be asked."""

    def __init__(self, node: str, size: int) -> None:
        self.seen = _Observer()
        self.exchange = Exchange(job="benchmark", token=b"t", node=node, host="127.0.0.1", observer=self.seen)
        self.size = size
        self.fds: dict[int, int] = {}

    def port(self) -> int:
        """Where it listens."""
        return self.exchange.port

    def open(self, peers: dict[int, tuple[str, int]], index: int) -> None:
        """Generation 0."""
        self.exchange.open(0, {number: Peer(node, "127.0.0.1", port) for number, (node, port) in peers.items()}, index)

    def make(self, rank: int) -> None:
        """An arena, and tensors to capture."""
        self.fds[rank] = os.memfd_create("arena", os.MFD_CLOEXEC)
        self.file, self.source = SlotFile(self.fds[rank]), bytearray(os.urandom(MIB) * (self.size // MIB))
        self.file.allocate(self.size + 2 * MIB)
        self.exchange.hold(self.fds)

    def capture(self, step: int) -> tuple[float, float]:
        """As a rank does: a block is copied, then hashed while it is in the cache. Returns seconds and CPU seconds."""
        begun, cpu = time.perf_counter(), time.process_time()
        head = encode(Manifest([Segment("t", (self.size,), "uint8", "", 0, self.size)], b"", 1))
        length, digests, place = len(head) + self.size, [], self.file.begin()
        with self.file.payload(place) as view, memoryview(self.source) as source:
            view[: len(head)] = head
            view[len(head) : CHUNK] = source[: CHUNK - len(head)]
            for start, size in blocks.cut(length, length, CHUNK):
                if start:
                    view[start : start + size] = source[start - len(head) : start - len(head) + size]
                digests.append(blocks.digest(view[start : start + size]))
        blocks.seal(self.file, place, step=step, kind=0, length=length, trailer=blocks.Trailer(CHUNK, length, digests))
        return time.perf_counter() - begun, time.process_time() - cpu

    def replicate(self, rank: int, step: int, index: int) -> tuple[float, float]:
        """Until it is acknowledged."""
        begun, cpu = time.perf_counter(), time.process_time()
        self.exchange.send(rank, step, [index])
        while (rank, step, index) not in self.seen.replicated:
            select.select([self.exchange.fileno()], [], [], _LIMIT_S)
            self.exchange.poll()
        return time.perf_counter() - begun, time.process_time() - cpu

    def fetch(self, rank: int, step: int, sources: list[int]) -> tuple[float, float]:
        """Into an arena that has no memory yet."""
        fd = os.memfd_create("arena", os.MFD_CLOEXEC)
        begun, cpu = time.perf_counter(), time.process_time()
        self.exchange.fetch([Want(rank, step, fd, tuple(sources))]).result(_LIMIT_S)
        spent = time.perf_counter() - begun, time.process_time() - cpu
        os.close(fd)
        return spent

    def cpu(self) -> float:
        """CPU seconds of this process so far."""
        return time.process_time()


def node_process(node: str, size: int) -> Process:
    """An `Agent` in a process of its own."""

    def body(sock: socket.socket) -> None:
        agent = Agent(node, size)
        _serve(sock, {name: getattr(agent, name) for name in ("port", "open", "make", "capture", "replicate", "fetch", "cpu")})

    return Process(body)


def memcpy_seconds(size: int, repeat: int) -> list[float]:
    """Into memory that has its pages."""
    source, target = memoryview(bytearray(os.urandom(MIB) * (size // MIB))), memoryview(bytearray(size))
    times = []
    for _ in range(repeat + 1):
        begun = time.perf_counter()
        target[:] = source
        times.append(time.perf_counter() - begun)
    return times[1:]  # the first one takes the pages


def bare_seconds(size: int, repeat: int) -> tuple[list[float], list[float]]:
    """Seconds, and CPU seconds of both ends, of sendall into recv_into."""
    server = socket.create_server(("127.0.0.1", 0))

    def body(sock: socket.socket) -> None:
        data, out = memoryview(bytearray(os.urandom(MIB) * (size // MIB))), socket.create_connection(server.getsockname())

        def send() -> float:
            cpu = time.process_time()
            for start in range(0, size, CHUNK):
                out.sendall(data[start : start + CHUNK])
            return time.process_time() - cpu

        _serve(sock, {"send": send})

    process = Process(body)
    into, times, cpus = memoryview(bytearray(size)), [], []
    with server, server.accept()[0] as end:
        for _ in range(repeat + 1):
            begun, cpu = time.perf_counter(), time.process_time()
            process.begin("send")
            done = 0
            while done < size:
                done += end.recv_into(into[done : done + CHUNK], CHUNK, socket.MSG_WAITALL)
            times.append(time.perf_counter() - begun)
            cpus.append(time.process_time() - cpu + process.end())
    process.close()
    return times[1:], cpus[1:]


def _one_way(agents: list[Process], repeat: int) -> tuple[list[float], list[float], list[float], list[float]]:
    """Capture and replicate: seconds of each, and CPU seconds of each (both ends)."""
    found: tuple[list[float], ...] = ([], [], [], [])
    for step in range(repeat + 2):
        captured, captured_cpu = agents[0].ask("capture", step)
        before = agents[1].ask("cpu")
        replicated, cpu = agents[0].ask("replicate", 0, step, 1)
        cpu += agents[1].ask("cpu") - before
        for series, value in zip(found, (captured, replicated, captured_cpu, cpu), strict=True):
            series.append(value)
    return tuple(series[2:] for series in found)  # type: ignore[return-value]  # both slots have been written once


def _both_ways(agents: list[Process], repeat: int) -> list[float]:
    """Seconds until both are acknowledged."""
    times = []
    for step in range(100, 102 + repeat):
        for agent in agents[:2]:
            agent.ask("capture", step)
        agents[0].begin("replicate", 0, step, 1)
        agents[1].begin("replicate", 1, step, 0)
        times.append(max(agent.end()[0] for agent in agents[:2]))
    return times[2:]


def measure(quick: bool) -> Report:
    """Run it."""
    size, repeat = (64 * MIB, 3) if quick else (512 * MIB, 7)
    report = Report("replication", "Replication between agents over loopback", quick)
    agents = [node_process(f"node-{number}", size) for number in range(4)]
    try:
        peers = {number: (f"node-{number}", agent.ask("port")) for number, agent in enumerate(agents)}
        for number, agent in enumerate(agents):
            agent.ask("open", peers, number)
        for number in (0, 1):
            agents[number].ask("make", number)
        memcpy = memcpy_seconds(size, repeat)
        bare, bare_cpu = bare_seconds(size, repeat)
        progress("replicate, one way")
        captured, replicated, captured_cpu, cpu = _one_way(agents, repeat)
        newest = repeat + 1
        agents[0].ask("replicate", 0, newest, 2)
        one = [agents[3].ask("fetch", 0, newest, [1]) for _ in range(repeat)]
        two = [agents[3].ask("fetch", 0, newest, [1, 2]) for _ in range(repeat)]
        progress("replicate, both ways")
        both = _both_ways(agents, repeat)
    finally:
        for agent in agents:
            agent.close()
    mib = size // MIB
    report.spreads(f"{mib} MiB (s)", {
        "memcpy": memcpy, "bare sendall and recv_into": bare, "capture (copy and hash)": captured,
        "replicate until acknowledged": replicated,
        "replicate, both ways at once": both, "fetch from one source": [s for s, _ in one], "fetch from two": [s for s, _ in two],
    })  # fmt: skip
    gib = size / _GIB
    per_gib = [(a + b) / gib for a, b in zip(captured_cpu, cpu, strict=True)]
    report.spreads("CPU seconds per GiB, both ends", {
        "bare sendall and recv_into": [value / gib for value in bare_cpu], "capture": [value / gib for value in captured_cpu],
        "send, receive, verify": [value / gib for value in cpu], "all of it": per_gib,
        "fetch, the receiving end": [value / gib for _, value in one],
    })  # fmt: skip
    report.check(Check("replicate each way", size / 1e9 / statistics.median(both), 0.6, at_least=True, unit=" GB/s"))
    report.check(Check("CPU: capture, send, receive, verify", statistics.median(per_gib), 1.2, unit=" s/GiB"))
    for name, series in (("one source", one), ("two sources", two)):
        report.check(Check(f"fetch {mib} MiB from {name}", statistics.median(s for s, _ in series), 1.2, unit=" s"))
    return report


if __name__ == "__main__":
    main(__doc__, measure)
