"""A recipe under faults: one job of ours that goes on, and the framework's own way, a job that is started again from its last checkpoint.

Both sides are the recipe's own script on the same data. The framework's way saves a checkpoint in every step, so that it loses no more than
we do, and its job is started again the instant it has ended: what a scheduler would add is not counted.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import launch
from benchmarks.common import ROOT, Check, Report, Spread, progress

WHAT = {"kill": "SIGKILL", "raise": "exception"}
_FIRST, _APART, _LIMIT_S, _RATIO = 3, 3, 400.0, 10.0


@dataclass(frozen=True)
class Recipe:
    """`ours` and `own` are what the command line has beside `options` for our way and the framework's; `{directory}` is filled in."""

    name: str
    script: str
    options: tuple[str, ...]
    ours: tuple[str, ...]
    own: tuple[str, ...]
    ranks: int = 2

    def command(self, directory: Path, *overrides: str) -> list[str]:
        """To start it."""
        line = [*self.options, *overrides]
        return [sys.executable, str(ROOT / "benchmarks" / "recipe_job.py"), *(item.replace("{directory}", str(directory)) for item in line)]

    def tell(self, directory: Path, gates: Sequence[int] = (), kind: str = "kill", fault_steps: Sequence[int] = ()) -> None:
        """The job, through its environment."""
        told = {"directory": str(directory), "gates": list(gates), "kind": kind, "fault_steps": list(fault_steps)}
        os.environ["RECIPE_BENCH"] = json.dumps({**told, "script": self.script, "ranks": self.ranks})

    def seconds(self, directory: Path, count: int) -> list[float]:
        """Of each fault, until all ranks have completed the step it struck."""
        found = launch.recovery_seconds(directory, self.ranks)
        if len(found) != count:
            raise RuntimeError(f"{count} faults were to be injected, {len(found)} were:\n{launch.tail(directory)}")
        return found


def struck(count: int) -> list[int]:
    """The steps in which the faults are."""
    return [_FIRST + _APART * i for i in range(count)]


def ours(recipe: Recipe, directory: Path, kind: str, count: int) -> list[float]:
    """One job; each fault waits for a warm spare."""
    steps = struck(count)
    faults = ",".join(f"{{kind:{kind},rank:{i % recipe.ranks},step:{step},where:before_step}}" for i, step in enumerate(steps))
    gates = [step - 1 for step in steps]
    recipe.tell(directory, gates)
    more = (f"trainer.strategy.faults=[{faults}]", f"trainer.strategy.telemetry.directory={directory}/gemini")
    command = recipe.command(directory, f"trainer.max_steps={steps[-1] + 3}", *recipe.ours, *more)
    launch.run(directory, command, _LIMIT_S, gates, lambda: launch.spare_ready(directory), recipe.ranks)
    return recipe.seconds(directory, count)


def restarts(recipe: Recipe, directory: Path, kind: str, count: int) -> list[float]:
    """The job is started again and again until it ends well."""
    steps = struck(count)
    recipe.tell(directory, kind=kind, fault_steps=steps)
    command = recipe.command(directory, f"trainer.max_steps={steps[-1] + 3}", *recipe.own)
    for _ in range(count + 1):
        with launch.running(directory, command) as process:
            try:
                process.wait(_LIMIT_S)
            except subprocess.TimeoutExpired:
                raise TimeoutError(f"the job hangs:\n{launch.tail(directory)}") from None
        if process.returncode == 0:
            return recipe.seconds(directory, count)
    raise RuntimeError(f"the job ended with status {process.returncode} although no fault was left:\n{launch.tail(directory)}")


def compare(report: Report, base: Path, recipe: Recipe, kind: str, count: int, restarted: int, their: str) -> None:
    """Both ways, `count` faults of ours and `restarted` of theirs, into the report."""
    name, what = recipe.name, WHAT[kind]
    progress(f"{name}: {count} x {what} under our strategy")
    mine = ours(recipe, base / f"{name}-{kind}", kind, count)
    progress(f"{name}: {restarted} x {what}, {their}")
    theirs = restarts(recipe, base / f"{name}-{kind}-own", kind, restarted)
    report.spreads(f"{name}, {what}: seconds until all ranks have completed the step", {"ours": mine, their: theirs})
    events = launch.agent_events(base / f"{name}-{kind}", "recovered")
    phases = {phase: [event["seconds"][phase] for event in events] for phase in events[0]["seconds"]}
    report.spreads(f"Ours, {name}, {what}: seconds by phase, from the agent's telemetry", phases)
    ratio = statistics.median(theirs) / Spread.of(mine).median
    report.check(Check(f"{name}, {what}: times faster than {their} (medians)", ratio, _RATIO, at_least=True))


def lines_for_us(folder: str, *patterns: str) -> int:
    """Lines of a recipe that name us."""
    files = [file for pattern in patterns for file in (ROOT / folder).glob(pattern)]
    return sum("gemini" in line.lower() for file in files for line in file.read_text().splitlines())
