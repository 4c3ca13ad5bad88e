"""Runs real jobs of several nodes: one forked agent per node, forked ranks, a real etcd, real signals.

Nodes are addresses of loopback, or (with `nodes`) network namespaces of their own. The parent (pytest) has torch and lightning imported.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from lightning_gemini.agent.cluster import Cluster
from lightning_gemini.agent.joining import Options, through_etcd
from lightning_gemini.agent.lives import live
from lightning_gemini.agent.spawn import ForkSpawner
from lightning_gemini.agent.supervisor import Supervisor
from lightning_gemini.config import MembershipConfig
from lightning_gemini.telemetry.events import read_events
from tests.support.nodes import Nodes
from tests.support.stacks import brief, signal_all, tell_votes
from tests.support.storing import storage_process

TOKEN = b"a secret of this test"


@dataclass
class JobOnNodes:
    """A running job: `agents` are the pids of the nodes' agents, each the leader of a process group with all processes of its node."""

    directory: Path
    etcd: list[str]
    target: Callable[[], None]
    count: int
    per_node: int
    nodes: Nodes | None = None
    membership: dict[str, Any] = field(default_factory=dict)
    agents: dict[int, int] = field(default_factory=dict)
    statuses: dict[int, int] = field(default_factory=dict)
    tokens: dict[int, bytes] = field(default_factory=dict)
    """Of nodes that have another one."""
    scripts: dict[int, str] = field(default_factory=dict)
    """Of nodes that run another one."""
    groups: dict[int, int] = field(default_factory=dict)
    """node -> process group, also of nodes that have ended."""

    def start(self, number: int, **options: Any) -> None:
        """Start the agent of a node; those beyond `count` are spares."""
        log = self.directory / f"node{number}.txt"
        pid = os.fork()
        if pid:
            self.agents[number] = self.groups[number] = pid
            return
        status = 99
        try:
            os.setsid()
            fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(fd, 1)
            os.dup2(fd, 2)
            sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            os.chdir(self.directory)
            status = self._run(number, options)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def _run(self, number: int, options: dict[str, Any]) -> int:
        if self.nodes is not None:
            self.nodes.enter(number)
            host = self.nodes.address(number)
        else:
            host = f"127.0.0.{number + 1}"
        rank = number if number < self.count else -1
        options = {"ranks_per_node": self.per_node, **options}
        here = Cluster(nnodes=self.count, node_rank=rank, job=self.directory.name, host=host, **options)
        config = MembershipConfig(etcd=self.etcd, **self.membership)
        told = Options(membership=config, token=self.tokens.get(number, TOKEN), script=["script", self.scripts.get(number, "")])
        spawner = ForkSpawner(self.target)
        faulthandler.register(signal.SIGUSR1)  # for `stacks`

        def start(here: Cluster) -> Supervisor:
            made = Supervisor(spawner, here.ranks_per_node, through_etcd(here, told), storage=storage_process)
            signal.signal(signal.SIGUSR2, lambda *_: tell_votes(made))
            return made

        try:
            return live(here, start)
        except (ValueError, ConnectionError) as error:  # as `agent.main` does
            print(f"lightning-gemini: {error}", file=sys.stderr)
            return 2

    def kill(self, number: int) -> None:
        """All processes of a node, at once."""
        os.killpg(self.agents[number], signal.SIGKILL)
        self._reap(number, 0)

    def _reap(self, number: int, flags: int) -> bool:
        done, raw = os.waitpid(self.agents[number], flags)
        if done:
            del self.agents[number]
            self.statuses[number] = os.waitstatus_to_exitcode(raw)
        return bool(done)

    def output(self, number: int) -> str:
        """Of a node."""
        path = self.directory / f"node{number}.txt"
        return path.read_text() if path.exists() else ""

    def outputs(self) -> str:
        """Of all."""
        return "\n".join(f"--- node {path.stem[4:]}\n{path.read_text()[-5000:]}" for path in sorted(self.directory.glob("node*.txt")))

    def stacks(self) -> str:
        """`outputs`, what each agent knows of the votes, its last event, and where every thread of every process is."""
        signal_all(self.agents.values(), signal.SIGUSR2)
        said = self.outputs()
        last = {number: event["event"] for event in self.events for number, pid in self.groups.items() if event["pid"] == pid}
        before = {path: path.stat().st_size for path in self.directory.glob("node*.txt")}
        signal_all((pid for number in self.agents for pid in self.alive(number)), signal.SIGUSR1)
        frames = [f"--- {path.stem}\n{brief(path.read_text()[size:])}" for path, size in before.items()]
        return "\n".join([said, f"--- the last events: {last}", *frames])

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
        """Wait until something has happened."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline or not self.agents:
                raise TimeoutError(f"{what} did not happen\n{self.stacks()}")
            for number in list(self.agents):
                self._reap(number, os.WNOHANG)
            time.sleep(0.01)

    def wait(self, timeout_s: float = 100.0) -> dict[int, int]:
        """Until all agents have ended; node -> exit status."""
        deadline = time.monotonic() + timeout_s
        while self.agents:
            for number in list(self.agents):
                self._reap(number, os.WNOHANG)
            if time.monotonic() > deadline:
                output = self.stacks()
                self.stop()
                raise TimeoutError(f"job in {self.directory} did not end\n{output}")
            time.sleep(0.01)
        return self.statuses

    def stop(self) -> None:
        """Whatever is left."""
        for number, pid in list(self.agents.items()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            self._reap(number, 0)

    @property
    def events(self) -> list[dict[str, Any]]:
        """Of all agents, in order of time."""
        found = [event for path in (self.directory / "gemini").glob("agent*.jsonl") for event in read_events(str(path))]
        return sorted(found, key=lambda event: float(event["time"]))

    def named(self, event: str) -> list[dict[str, Any]]:
        """Events of one kind."""
        return [found for found in self.events if found["event"] == event]

    @property
    def ranks(self) -> dict[int, dict[str, Any]]:
        """What each rank has written at the end."""
        return {int(path.stem[4:]): json.loads(path.read_text()) for path in self.directory.glob("rank*.json")}

    @property
    def recoveries(self) -> list[dict[str, Any]]:
        """Each once, although every node tells of it."""
        return list({event["generation"]: event for event in self.named("recovered")}.values())

    def named_of(self, number: int, event: str) -> list[dict[str, Any]]:
        """Events of one kind, of the agent of one node."""
        return [found for found in self.named(event) if found["pid"] == self.groups[number]]

    def pids(self) -> dict[int, list[int]]:
        """The processes that were each rank, in order."""
        files = sorted((self.directory / "gemini").glob("rank*.jsonl"))
        joined = {int(path.stem[4:]): [e["pid"] for e in read_events(str(path)) if e["event"] == "joined"] for path in files}
        return {rank: list(dict.fromkeys(pids)) for rank, pids in joined.items()}

    @property
    def injected(self) -> int:
        """Faults of the option `faults` that have happened."""
        files = (self.directory / "gemini").glob("rank*.jsonl")
        return sum(event["event"] == "fault_injected" for path in files for event in read_events(str(path)))

    def alive(self, number: int) -> list[int]:
        """Processes of a node, loader processes (which have groups of their own) included."""
        loaders = {event["loader_pid"] for event in self.named_of(number, "loader_started")}
        return [pid for pid in psutil.pids() if _group(pid) == self.groups[number] or _group(pid) in loaders]

    def step(self) -> int:
        """The furthest step that rank 0 has told, -1 for none."""
        path = self.directory / "step"
        return int(path.read_text()) if path.exists() else -1


def _group(pid: int) -> int:
    """Process group of a process that is no zombie, else -1."""
    try:
        return -1 if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE else os.getpgid(pid)
    except (ProcessLookupError, psutil.NoSuchProcess):
        return -1


def on_nodes(
    directory: Path,
    etcd: list[str],
    target: Callable[[], None],
    count: int,
    per_node: int,
    spares: int = 0,
    domains: Sequence[str] = (),
    **options: Any,
) -> JobOnNodes:
    """Start a job of `count` nodes; `domains` of all of them, spares included."""
    directory.mkdir(parents=True, exist_ok=True)
    job = JobOnNodes(directory, etcd, target, count, per_node, **options)
    for number in range(count + spares):
        job.start(number, spare=number >= count, domain=domains[number] if domains else "")
    return job
