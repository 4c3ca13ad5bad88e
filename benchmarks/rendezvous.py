"""Init of a gloo group among peers against TCPStore, and what 16,384 ranks would cost, by simulation.

Real processes, forked from one that has imported torch. Before the clock starts every listener of either side listens; no client is
connected. Then all ranks build their store and the group. Runs of both sides alternate. Where it can, the script moves into a network
namespace with nothing but a loopback device: TCPStore looks addresses up backwards, and where DNS does not answer that alone takes
seconds, which is not what is compared.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from benchmarks.common import Check, Report, Spread, main, number, progress
from lightning_gemini.peers import bruck
from lightning_gemini.peers.node import PeerNode
from lightning_gemini.peers.roster import Roster
from lightning_gemini.rendezvous.store import PeerStore

_FORK = multiprocessing.get_context("fork")
_SIDES = ("TCPStore", "peers, TCP", "peers, unix")
_LIMITS = {16: 1.0, 32: 1.0, 64: 1.0}
_ALONE = "GEMINI_BENCH_ALONE"
_DEADLINE = timedelta(seconds=120)
TCPStore = dist.TCPStore  # type: ignore[attr-defined]


class CountingStore(Store):
    """A TCPStore's client that counts what gloo asks of the server."""

    def __init__(self, inner: Store) -> None:
        super().__init__()
        self.inner, self.count = inner, 0

    def set(self, key: str, value: Any) -> None:
        self.count += 1
        self.inner.set(key, value if isinstance(value, str) else bytes(value))  # type: ignore[arg-type]

    def get(self, key: str) -> bytes:
        self.count += 1
        return bytes(self.inner.get(key))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self.count += 1
        self.inner.wait(keys, timeout or _DEADLINE)


def _prepare(side: str, rank: int, size: int, job: str) -> Callable[[], tuple[Any, Callable[[], tuple[int, int]]]]:
    """What listens is made now; returned is what makes the store, and with it a way to ask for (connections, requests) of this listener."""
    torch.set_num_threads(1)
    if side == "TCPStore":
        port = int(job)
        server = TCPStore("127.0.0.1", port, size, True, _DEADLINE, wait_for_workers=False) if rank == 0 else None

        def connect() -> tuple[Any, Callable[[], tuple[int, int]]]:
            store = server or TCPStore("127.0.0.1", port, size, False, _DEADLINE, wait_for_workers=False)
            counting = CountingStore(store) if os.environ.get("GEMINI_BENCH_COUNT") else None
            return counting or store, lambda: (1, counting.count if counting else 0)

        return connect
    roster = Roster.on_one_node(job, size) if side == "peers, unix" else Roster.on_hosts(job, ["127.0.0.1"], size)
    node = PeerNode(roster, rank, token=b"" if side == "peers, unix" else b"token", timeout_s=_DEADLINE.total_seconds())
    return lambda: (PeerStore(node), lambda: (node.accepted, node.requests))


def _rank(side: str, rank: int, size: int, job: str, ready: Any, go: tuple[int, int], results: Any) -> None:
    os.close(go[1])
    connect = _prepare(side, rank, size, job)
    ready.release()
    os.read(go[0], 1)  # the end of file wakes all at once; an Event wakes one after the other, while the first are at work
    begun, cpu = time.monotonic(), time.process_time()
    store, ask = connect()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    ended, cpu = time.monotonic(), time.process_time() - cpu
    results.put((begun, ended, cpu, *ask()))
    dist.barrier()
    os._exit(0)


def init(side: str, size: int) -> tuple[float, float, list[tuple[int, int]]]:
    """Seconds until the last of `size` ranks has its group, CPU seconds of all, and (connections, requests) by rank."""
    job = str(_free_port()) if side == "TCPStore" else f"bench-{os.getpid()}-{time.monotonic_ns()}"
    ready, go, results = _FORK.Semaphore(0), os.pipe(), _FORK.SimpleQueue()
    ranks = [_FORK.Process(target=_rank, args=(side, rank, size, job, ready, go, results)) for rank in range(size)]
    for process in ranks:
        process.start()
    for _ in ranks:
        ready.acquire()
    os.close(go[1])
    told = [results.get() for _ in ranks]
    for process in ranks:
        process.join()
    os.close(go[0])
    return max(t[1] for t in told) - min(t[0] for t in told), sum(t[2] for t in told), [(t[3], t[4]) for t in told]


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _busiest(size: int) -> list[str]:
    """A row: what the busiest listener of either side has served while `size` ranks formed one group; counted."""
    os.environ["GEMINI_BENCH_COUNT"] = "1"
    try:
        _, _, central = init("TCPStore", size)
    finally:
        del os.environ["GEMINI_BENCH_COUNT"]
    _, _, peers = init("peers, unix", size)
    return [
        str(size),
        str(sum(connections for connections, _ in central)),
        str(sum(requests for _, requests in central)),
        str(max(connections for connections, _ in peers)),
        str(max(requests for _, requests in peers)),
    ]


def simulate(size: int) -> list[str]:
    """A row for a job of `size` ranks: the real schedule of every rank, followed block by block (as ranges), and the tree of readers."""
    held = [1] * size
    arrived: Counter[int] = Counter()
    plans = [bruck.rounds(rank, size) for rank in range(size)]
    for turn in range(len(plans[0])):
        before = list(held)
        for rank in range(size):
            step = plans[rank][turn]
            if plans[step.source][turn].to != rank or before[step.source] < step.count or (rank + before[rank]) % size != step.source:
                raise AssertionError(f"round {turn}: rank {rank} does not get what it needs from {step.source}")
            held[rank] += plans[step.source][turn].count
            arrived[step.to] += 1
    if set(held) != {size}:
        raise AssertionError(f"not every rank has all {size} blocks")
    readers = Counter(bruck.parent(rank, 0, size) for rank in range(1, size))
    depth = max(_depth(rank, size) for rank in range(1, size))
    counts = [size, len(plans[0]), max(arrived.values()), sum(arrived.values()), max(readers.values()), depth, size + 2 * size * size]
    return [f"{count:,}" for count in counts]


def _depth(rank: int, size: int) -> int:
    steps = 0
    while rank:
        rank, steps = bruck.parent(rank, 0, size), steps + 1
    return steps


def measure(quick: bool) -> Report:
    """Run it."""
    report = Report("rendezvous", "Init of a process group: peers against TCPStore", quick)
    sizes, times = ((4, 16), 2) if quick else ((4, 16, 32, 64), 15)
    rows = []
    for size in sizes:
        progress(f"{size} ranks")
        runs: dict[str, list[tuple[float, float]]] = {side: [] for side in _SIDES}
        for _ in range(times):
            for side in _SIDES:
                seconds, cpu, _ = init(side, size)
                runs[side].append((seconds, cpu))
        base = statistics.median(seconds for seconds, _ in runs["TCPStore"])
        for side in _SIDES:
            spread = Spread.of([1e3 * seconds for seconds, _ in runs[side]])
            rows.append([str(size), side, *map(number, (spread.median, spread.minimum, spread.maximum)),
                         number(1e3 * statistics.median(cpu for _, cpu in runs[side])), number(spread.median / 1e3 / base)])  # fmt: skip
            if side == "peers, TCP" and size in _LIMITS:
                report.check(Check(f"init of {size} ranks, peers over TCP / TCPStore", spread.median / 1e3 / base, _LIMITS[size]))
    report.table(f"Until the last rank has its gloo group, {times} runs each (ms)",
                 ["ranks", "rendezvous", "median", "min", "max", "CPU of all", "ratio"], rows)  # fmt: skip
    counted = ["ranks", "TCPStore: connections", "operations", "peers: connections", "requests"]
    report.table("Counted at the busiest listener", counted, [_busiest(size) for size in sizes])
    progress("simulating up to 16,384 ranks")
    header = ["ranks", "rounds", "messages at the busiest", "in all", "readers of one rank", "hops of a key", "TCPStore operations"]
    rows = [simulate(size) for size in (64, 256, 1024, 2304, 4096, 10_000, 16_384)]
    report.table("Simulated: one all-gather, and one key that all read", header, rows)
    report.say(
        "Real processes of one machine: gloo's own full mesh of connections is most of each time and the same on all sides. `peers, TCP` "
        "authenticates every connection with a token. The simulation follows the product's own schedule for every rank."
    )
    return report


def alone(module: str) -> None:
    """Run `module` in a network namespace of its own, where nobody answers for DNS and so nobody is waited for; returns inside."""
    if os.environ.get(_ALONE) or os.geteuid() or not (shutil.which("unshare") and shutil.which("ip")):
        return
    inside = [sys.executable, "-m", module, *sys.argv[1:]]
    command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *inside]
    sys.exit(subprocess.run(command, env=os.environ | {_ALONE: "1"}, check=False).returncode)


if __name__ == "__main__":
    alone("benchmarks.rendezvous")
    main(__doc__, measure)
