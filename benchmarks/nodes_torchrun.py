"""Two nodes under torchrun, one of which is killed and started again at once: what a recovery of ours is compared with."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from benchmarks import launch
from benchmarks.common import ROOT
from tests.support.meeting import free_port

_WORLD = 2
_FIRST, _APART = 3, 3
_LIMIT_S = 150.0
_POLL_S = 0.02


class _Job:
    """Two torchruns with a worker each; node 0 has the store."""

    def __init__(self, directory: Path, gates: list[int]) -> None:
        self.directory, self.gates = directory, gates
        directory.mkdir(parents=True)
        self._port, self._log = free_port(), (directory / "output.txt").open("ab")
        self.nodes = [self._start(store=True), self._start()]

    def _start(self, *, store: bool = False) -> subprocess.Popen[bytes]:
        run = ["-m", "torch.distributed.run", f"--nnodes={_WORLD}", "--nproc-per-node=1", "--max-restarts=100", "--rdzv-backend=c10d"]
        run += [f"--rdzv-endpoint=127.0.0.1:{self._port}", "--rdzv-id=benchmark", "--local-addr=127.0.0.1", str(launch.JOB)]
        run.insert(2, f"--rdzv-conf=is_host={int(store)}")  # on one machine either would take the store
        run += ["--strategy", "ddp", "--directory", str(self.directory), "--world", str(_WORLD), "--checkpoint-every", "1"]
        run += ["--steps", str(self.gates[-1] + 3), "--gates", json.dumps(self.gates)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": "lo"}
        return subprocess.Popen([sys.executable, *run], cwd=ROOT, env=environment, stdout=self._log, stderr=subprocess.STDOUT)

    def lose(self, gate: int) -> float:
        """Kill node 1 at a gate, start it again. Seconds until both ranks have completed another step."""
        self._until(lambda: all(any(s.step >= gate for s in launch.steps(self.directory, rank)) for rank in range(_WORLD)), f"gate {gate}")
        (self.directory / f"go-{gate}").touch()
        at = time.monotonic_ns()
        _kill(self.nodes[1])
        self.nodes[1] = self._start()
        self._until(lambda: self._next(gate, at) > 0, f"a step after {gate}")
        return (self._next(gate, at) - at) / 1e9

    def _next(self, gate: int, at: int) -> int:
        """When both had completed another step; 0 for not yet."""
        done = [[s.at_ns for s in launch.steps(self.directory, rank) if s.step > gate and s.at_ns > at] for rank in range(_WORLD)]
        return max(times[0] for times in done) if all(done) else 0

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _LIMIT_S
        while not condition():
            if time.monotonic() > deadline or self.nodes[0].poll() is not None:
                raise TimeoutError(f"torchrun: {what} did not come:\n{launch.tail(self.directory)}")
            time.sleep(_POLL_S)

    def close(self) -> None:
        """End it."""
        for node in self.nodes:
            _kill(node)
        self._log.close()


def _kill(node: subprocess.Popen[bytes]) -> None:
    """A node's torchrun and its worker, which has a session of its own."""
    family = psutil.Process(node.pid).children(recursive=True) if node.poll() is None else []
    node.kill()
    for child in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    node.wait()


def lose_nodes_of_torchrun(directory: Path, count: int) -> list[float]:
    """Seconds of `count` losses of a node in one job."""
    job = _Job(directory, [_FIRST + _APART * number for number in range(count)])
    try:
        return [job.lose(gate) for gate in job.gates]
    finally:
        job.close()
