"""50 kills in one run: does anything grow, and is the end bit-identical to an undisturbed run?

Ranks and spares are forked, as in the tests: a spare is warm in a fraction of a second, the recovery is the same. Each kill waits until a
spare is ready; then the agent and the one rank that is never killed are looked at from outside.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import psutil
import torch

from benchmarks import launch
from benchmarks.common import MIB, Check, Report, main, progress
from benchmarks.job import Gate
from lightning_gemini import GeminiStrategy
from lightning_gemini.telemetry.events import read_events
from tests.support import jobs, models

_APART = 2
_SURVIVOR = launch.WORLD - 1
_PLACES = ("forward", "backward", "optimizer", "before_step", "after_step")
_ENDS = 10
"""Samples at either end that are compared."""
_TIMEOUT_S = 900.0
_POLL_S = 0.02
_MEMORY_TARGET = 1.05
_SETTLE_S = 0.1


@dataclass(frozen=True, slots=True)
class Plan:
    """What is done to the run."""

    kills: int

    @property
    def steps(self) -> list[int]:
        """The steps that are struck."""
        return [_APART * (i + 1) for i in range(self.kills)]

    @property
    def gates(self) -> list[int]:
        """Where the ranks wait before each kill, and once after the last."""
        return [step - 1 for step in self.steps] + [self.steps[-1] + 1]

    @property
    def length(self) -> int:
        """Steps of the run."""
        return self.gates[-1] + _APART

    def faults(self) -> list[dict[str, object]]:
        """Ranks and places in turn; every rank but the survivor, rank 0 included."""
        found = []
        for i, step in enumerate(self.steps):
            found.append({"kind": "kill", "rank": i % _SURVIVOR, "step": step, "where": _PLACES[i % len(_PLACES)]})
        return found


def _target(directory: Path, plan: Plan, disturbed: bool) -> Callable[[], None]:
    def train() -> None:
        pl.seed_everything(1)
        callbacks: list[pl.Callback] = [jobs.Recorder(str(directory))]
        if disturbed:
            callbacks.insert(0, Gate(directory, plan.gates))
        telemetry = {"directory": str(directory / "gemini"), "banner": False}
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=launch.WORLD,
            strategy=GeminiStrategy(telemetry=telemetry, faults=plan.faults() if disturbed else []),  # type: ignore[arg-type]
            max_steps=plan.length,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=directory,
        )
        trainer.fit(models.Net(), models.loader(480))

    return train


Sample = dict[str, float]


def _process(name: str, pid: int) -> Sample:
    process = psutil.Process(pid)
    with process.oneshot():
        memory = process.memory_info()
        return {
            f"{name}: file descriptors": float(process.num_fds()),
            f"{name}: threads": float(process.num_threads()),
            f"{name}: RSS, MiB": memory.rss / MIB,
            f"{name}: RSS without shared pages, MiB": (memory.rss - memory.shared) / MIB,
        }


def _shared(pid: int) -> Sample:
    sizes, taken = 0, 0
    for name in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{name}"
        if os.readlink(path).startswith("/memfd:gemini"):
            stat = os.stat(path)
            sizes, taken = sizes + stat.st_size, taken + stat.st_blocks * 512
    return {"shared memory: size, MiB": sizes / MIB, "shared memory: taken, MiB": taken / MIB}


class Watch:
    """Opens the gates one by one; at each, when a spare is ready, takes a sample."""

    def __init__(self, directory: Path, plan: Plan) -> None:
        self.directory, self.plan = directory, plan
        self.samples: list[Sample] = []
        self.agent = 0

    def __call__(self, agent: int) -> None:
        self.agent = agent
        deadline = time.monotonic() + _TIMEOUT_S
        for done, gate in enumerate(self.plan.gates):
            while not self._ready(done):
                if time.monotonic() > deadline or not psutil.pid_exists(agent) or psutil.Process(agent).status() == psutil.STATUS_ZOMBIE:
                    return  # run_job reports the end
                time.sleep(_POLL_S)
            time.sleep(_SETTLE_S)
            self.samples.append(_process("agent", agent) | _process("surviving rank", self._survivor()) | _shared(agent))
            (self.directory / f"go-{gate}").touch()

    def _ready(self, kills: int) -> bool:
        return len(launch.agent_events(self.directory, "recovered")) >= kills and launch.spare_ready(self.directory)

    def _survivor(self) -> int:
        events = read_events(str(self.directory / "gemini" / f"rank{_SURVIVOR}.jsonl"))
        return int(events[0]["pid"])


def _growth(report: Report, samples: list[Sample], ends: int) -> None:
    rows = []
    for name in samples[0]:
        values = [sample[name] for sample in samples[1:]]
        first, last = statistics.median(values[:ends]), statistics.median(values[-ends:])
        figures = [f"{value:g}" for value in (samples[0][name], first, last, last / first, min(values), max(values))]
        rows.append([name, *figures])
        exact = "descriptors" in name or "threads" in name or "shared memory" in name
        report.check(Check(f"{name}, last / first", last / first, 1.0 if exact else _MEMORY_TARGET))
    header = ["", "before", f"median of first {ends}", f"median of last {ends}", "ratio", "min", "max"]
    report.table("After each recovery, when a spare is ready", header, rows)


def _kills(directory: Path, plan: Plan, watch: Watch) -> jobs.Result:
    try:
        return jobs.run_job(directory, _target(directory, plan, True), launch.WORLD, _TIMEOUT_S, watch)
    except BaseException:  # the job has a session of its own: it does not end with this process
        with contextlib.suppress(ProcessLookupError):
            os.killpg(watch.agent, signal.SIGKILL)
        raise


def _identical(disturbed: jobs.Result, undisturbed: jobs.Result) -> bool:
    try:
        jobs.same(disturbed, undisturbed)
    except AssertionError as difference:
        progress(f"NOT bit-identical: {difference}")
        return False
    return True


def measure(quick: bool) -> Report:
    """Run it."""
    torch.set_num_threads(1)
    plan = Plan(5 if quick else 50)
    report = Report("endurance", f"{plan.kills} kills in one run", quick)
    with tempfile.TemporaryDirectory(prefix="gemini-bench-") as name:
        base = Path(name)
        progress("an undisturbed run")
        reference = jobs.run_job(base / "undisturbed", _target(base / "undisturbed", plan, False), launch.WORLD, _TIMEOUT_S)
        progress(f"the same with {plan.kills} kills")
        watch = Watch(base / "kills", plan)
        result = _kills(base / "kills", plan, watch)
        if result.exit_status != 0 or len(watch.samples) != len(plan.gates) or result.injected != plan.kills:
            raise RuntimeError(f"{result.injected} of {plan.kills} kills, exit status {result.exit_status}:\n{result.output[-6000:]}")
        _growth(report, watch.samples, min(_ENDS, plan.kills // 2))
        report.check(Check("bit-identical to the undisturbed run (1: yes)", float(_identical(result, reference)), 1.0, at_least=True))
        report.check(Check("recoveries", float(len(result.recoveries)), float(plan.kills), at_least=True))
        seconds = [sum(event["seconds"].values()) for event in result.recoveries]
        report.spreads("Seconds of each recovery, from the agent's telemetry", {"SIGKILL, forked spares": seconds})
    report.say(
        f"{launch.WORLD} ranks, forked from a process that has torch and lightning imported, so that RSS contains pages shared with it. "
        f"Kills strike ranks 0 to {_SURVIVOR - 1} in turn, in {', '.join(_PLACES)} in turn, {_APART} steps apart; rank {_SURVIVOR} "
        "survives all of them. Compared bit by bit: losses of every step, parameters, buffers, optimizer state, learning rates, RNG."
    )
    return report


if __name__ == "__main__":
    main(__doc__, measure)
