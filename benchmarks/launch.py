"""Starts the measured jobs the way users do, opens their gates, and reads what they left."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks.common import ROOT
from lightning_gemini.telemetry.events import read_events

WORLD = 4
JOB = ROOT / "benchmarks" / "job.py"
MAX_RESTARTS = 3
_POLL_S = 0.02
_GATE_S = 120.0
"""Limit from one gate to the next: a recovery, a few steps, a spare."""
_FRESH_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""For torchrun, in its favour: by default restarted workers find the addresses of the dead ones in the agent's store (torch 2.13), and gloo
fails to connect, again and again, until the restarts are used up."""


class Step(NamedTuple):
    """A completed step of a rank."""

    step: int
    at_ns: int
    cpu_s: float


def gemini(directory: Path, *arguments: object) -> list[str]:
    """`python job.py` with our strategy: the process becomes the agent and starts the ranks."""
    return [sys.executable, *_job("gemini", directory, arguments)]


def torchrun(directory: Path, *arguments: object) -> list[str]:
    """The baseline."""
    run = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}", f"--max-restarts={MAX_RESTARTS}"]
    return [sys.executable, *run, *_job("ddp", directory, arguments)]


def _job(strategy: str, directory: Path, arguments: Sequence[object]) -> list[str]:
    common = [str(JOB), "--strategy", strategy, "--directory", str(directory), "--world", str(WORLD)]
    return common + [item if isinstance(item, str) else json.dumps(item) for item in arguments]


@contextlib.contextmanager
def running(directory: Path, command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A job with one thread per rank; whatever is left of it is killed on leaving."""
    directory.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **_FRESH_STORE}
    with (directory / "output.txt").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        if process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)  # torchrun's workers have sessions of their own
            process.kill()
            for child in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        process.wait()


def run(
    directory: Path,
    command: list[str],
    timeout_s: float,
    gates: Sequence[int] = (),
    ready: Callable[[], bool] = lambda: True,
    world: int = WORLD,
) -> None:
    """Run a job to its end, opening each gate as soon as `ready`. Raises with the job's last words when it fails or hangs."""
    deadline, stalled = time.monotonic() + timeout_s, time.monotonic() + _GATE_S
    with running(directory, command) as process:
        waiting = list(gates)
        while process.poll() is None:
            if waiting and passed(directory, waiting[0], world) and ready():
                (directory / f"go-{waiting.pop(0)}").touch()
                stalled = time.monotonic() + _GATE_S
            if time.monotonic() > min(deadline, stalled if waiting else deadline):
                raise TimeoutError(f"the job hangs (gates still closed: {waiting}):\n{tail(directory)}")
            time.sleep(_POLL_S)
        if process.returncode:
            raise RuntimeError(f"the job ended with status {process.returncode}:\n{tail(directory)}")


def tail(directory: Path) -> str:
    """The last words of a job."""
    return (directory / "output.txt").read_text(errors="replace")[-3000:]


def passed(directory: Path, step: int, world: int = WORLD) -> bool:
    """Whether all ranks have completed `step` steps, so that they wait at its gate."""
    return all(any(done.step >= step for done in steps(directory, rank)) for rank in range(world))


def steps(directory: Path, rank: int) -> list[Step]:
    """The completed steps of a rank, in the order of time; a torn last line is left out."""
    path = directory / f"steps-rank{rank}.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [Step(*json.loads(line)) for line in lines]


def agent_events(directory: Path, event: str) -> list[dict[str, Any]]:
    """Events of one kind in the agent's telemetry."""
    path = directory / "gemini" / "agent.jsonl"
    return [found for found in read_events(str(path)) if found["event"] == event] if path.exists() else []


def spare_ready(directory: Path) -> bool:
    """Whether a warm spare waits, and no recovery is under way."""
    assigned, recovered = len(agent_events(directory, "assign")), len(agent_events(directory, "recovered"))
    return len(agent_events(directory, "spare_ready")) > assigned and recovered == len(agent_events(directory, "recover"))


def injected(directory: Path) -> dict[int, int]:
    """step -> moment (monotonic ns) of each fault that was injected, by either side."""
    found = {int(path.name.removeprefix("fault-")): int(path.read_text()) for path in directory.glob("fault-*")}
    for path in (directory / "gemini").glob("rank*.jsonl"):
        found |= {event["step"]: event["monotonic_ns"] for event in read_events(str(path)) if event["event"] == "fault_injected"}
    return found


def recovery_seconds(directory: Path, world: int = WORLD) -> list[float]:
    """For each fault, by step: from its moment until every rank has completed the step it struck, which no rank had completed before."""
    found = []
    for step, fault_ns in sorted(injected(directory).items()):
        done = [min(d.at_ns for d in steps(directory, rank) if d.step > step and d.at_ns > fault_ns) for rank in range(world)]
        found.append((max(done) - fault_ns) / 1e9)
    return found
