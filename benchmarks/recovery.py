"""From a fault to the next completed step of all ranks: ours against torchrun's restart and a checkpoint on local disk.

Both sides train the same model on the same data with 4 ranks, started from a script file as users do. A fault strikes one rank in its
forward pass, the ranks in turn. The clock starts in the faulty rank, an instant before the signal or exception, and stops when the last
rank has completed the step that was struck. Ours: the agent's phases are shown too; `detect` begins with the fault as well.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from benchmarks import launch
from benchmarks.common import Check, Report, Spread, main, progress

CHECKPOINT_EVERY = 1
_FIRST, _APART = 3, 4
_TARGETS = {"kill": 1.0, "raise": 0.5}
_RATIO = 10.0
_WHAT = {"kill": "SIGKILL", "raise": "exception"}


def _fault_steps(count: int) -> list[int]:
    return [_FIRST + _APART * i for i in range(count)]


def ours(directory: Path, kind: str, count: int, spares: int = 1) -> list[float]:
    """Seconds of `count` recoveries in one job; with spares, each fault waits for a warm one."""
    struck = _fault_steps(count)
    faults = [{"kind": kind, "rank": i % launch.WORLD, "step": step} for i, step in enumerate(struck)]
    gates = [step - 1 for step in struck] if spares else []
    command = launch.gemini(directory, "--steps", struck[-1] + 3, "--faults", faults, "--gates", gates, "--spares", spares)
    launch.run(directory, command, 60.0 + 30.0 * count, gates, lambda: launch.spare_ready(directory))
    return _complete(directory, count)


def restarts(directory: Path, kind: str, count: int) -> list[float]:
    """Seconds of `count` restarts of one torchrun job."""
    struck = _fault_steps(count)
    command = launch.torchrun(
        directory, "--steps", struck[-1] + 3, "--fault-steps", struck, "--fault-kind", kind, "--checkpoint-every", CHECKPOINT_EVERY
    )
    launch.run(directory, command, 90.0 + 60.0 * count)
    return _complete(directory, count)


def _complete(directory: Path, count: int) -> list[float]:
    seconds = launch.recovery_seconds(directory)
    if len(seconds) != count:
        raise RuntimeError(f"{count} faults were to be injected, {len(seconds)} were:\n{launch.tail(directory)}")
    return seconds


def undisturbed(directory: Path) -> list[float]:
    """Seconds of the steps in which nothing happened, by rank 0."""
    struck, done = set(launch.injected(directory)), launch.steps(directory, 0)
    pairs = [(a, b) for a, b in zip(done, done[1:], strict=False) if b.step == a.step + 1]
    return [(b.at_ns - a.at_ns) / 1e9 for a, b in pairs if not {a.step, a.step - 1, a.step + 1} & struck]


def _phases(report: Report, directory: Path, kind: str) -> None:
    events = launch.agent_events(directory, "recovered")
    names = list(events[0]["seconds"])
    series = {name: [event["seconds"][name] for event in events] for name in names}
    series["sum"] = [sum(event["seconds"].values()) for event in events]
    report.spreads(f"Ours, {_WHAT[kind]}: seconds by phase, from the agent's telemetry", series)


def _one_kind(report: Report, base: Path, kind: str, count: int, jobs: int, per_job: int) -> None:
    progress(f"{count} x {_WHAT[kind]} under our strategy")
    mine = ours(base / kind, kind, count)
    progress(f"{jobs * per_job} x {_WHAT[kind]} under torchrun")
    theirs = [second for job in range(jobs) for second in restarts(base / f"torchrun-{kind}-{job}", kind, per_job)]
    ratio = statistics.median(theirs) / statistics.median(mine)
    report.spreads(f"{_WHAT[kind]}: seconds until all ranks have completed a new step", {"ours": mine, "torchrun": theirs})
    _phases(report, base / kind, kind)
    spread = Spread.of(mine)
    report.check(Check(f"{_WHAT[kind]}: median", spread.median, _TARGETS[kind], unit=" s"))
    report.check(Check(f"{_WHAT[kind]}: p95", spread.p95, _TARGETS[kind], unit=" s"))
    report.check(Check(f"{_WHAT[kind]}: times faster than torchrun (medians)", ratio, _RATIO, at_least=True))


def measure(quick: bool) -> Report:
    """Run it."""
    report = Report("recovery", "From a fault to the next completed step of all ranks", quick)
    count, jobs, per_job, cold = (2, 1, 1, 1) if quick else (20, 2, launch.MAX_RESTARTS, 3)
    with tempfile.TemporaryDirectory(prefix="gemini-bench-") as name:
        base = Path(name)
        for kind in ("kill", "raise"):
            _one_kind(report, base, kind, count, jobs, per_job)
        progress(f"{cold} x SIGKILL under our strategy without a spare")
        unprepared = ours(base / "cold", "kill", cold, spares=0)
        report.spreads(
            "Beside it (seconds): until a spare is warm, a kill without any spare (`recovery.spares: 0`), and a normal step",
            {
                "spare is warm after": [event["seconds"] for event in launch.agent_events(base / "kill", "spare_ready")],
                "SIGKILL, no spare": unprepared,
                "a step, ours": undisturbed(base / "kill"),
                "a step, torchrun (with its checkpoint)": undisturbed(base / "torchrun-kill-0"),
            },
        )
    report.say(
        f"{launch.WORLD} ranks on one machine, one thread each, gloo; an MLP of about 1 million parameters with AdamW. A fault strikes one "
        "rank in its forward pass, the ranks in turn; time runs from the fault's own timestamp until the last rank has completed the step "
        "it struck. Ours: a snapshot every step, each fault injected when one warm spare was ready. Baseline: torchrun "
        f"--max-restarts={launch.MAX_RESTARTS}, strategy ddp, a ModelCheckpoint to local disk every {CHECKPOINT_EVERY} step(s), and "
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (without it restarted gloo workers look for the dead ones, and the job may not come back)."
    )
    return report


if __name__ == "__main__":
    main(__doc__, measure)
