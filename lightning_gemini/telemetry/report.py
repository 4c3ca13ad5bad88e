"""What a run's event files say: recoveries by phase, faults, goodput.

Seam: `summarize(directory)` reads the JSONL files of `telemetry.directory`; `text` prints them. A folder without an agent's file is no run
of ours: `ValueError`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from lightning_gemini.telemetry.events import PHASES, read_events


@dataclass(slots=True)
class Summary:
    """Of one run. Times in seconds."""

    elapsed_s: float
    faults: int
    injected: int
    recoveries: list[dict[str, Any]]
    repeated_steps: int
    pids: dict[int, list[int]]
    """Every process that was a rank, in order."""

    @property
    def recovery_s(self) -> float:
        """Time spent in recoveries, by whoever waited longest."""
        return sum(sum(recovery["seconds"].values()) for recovery in self.recoveries)


def summarize(directory: str) -> Summary:
    """Read a run's folder: the newest run, with the agents of all its nodes."""
    everything = [event for path in _files(directory, "agent") for event in read_events(path)]
    starts = [event for event in everything if event["event"] == "start"]
    if not starts:
        raise ValueError(f"{directory!r} has no agent*.jsonl of a run: give its telemetry.directory (default: <default_root_dir>/gemini)")
    job = max(starts, key=lambda event: float(event["time"]))["job"]
    agents = sorted((event for event in everything if event["job"] == job), key=lambda event: float(event["time"]))
    recoveries = {event["generation"]: event for event in agents if event["event"] == "recovered"}  # each node's agent says so
    pids: dict[int, list[int]] = {}
    injected = 0
    for path in _files(directory, "rank"):
        events = [event for event in read_events(path) if event["job"] == job]
        joined = [event for event in events if event["event"] == "joined"]
        if joined:
            pids[joined[0]["rank"]] = list(dict.fromkeys(event["pid"] for event in joined))
        injected += sum(event["event"] == "fault_injected" for event in events)
    return Summary(
        elapsed_s=agents[-1]["time"] - agents[0]["time"],
        faults=_faults(agents),
        injected=injected,
        recoveries=list(recoveries.values()),
        repeated_steps=sum(event["repeated_steps"] for event in recoveries.values()),
        pids=pids,
    )


def _files(directory: str, kind: str) -> list[str]:
    names = sorted(os.listdir(directory)) if os.path.isdir(directory) else []
    return [os.path.join(directory, name) for name in names if name.startswith(kind) and name.endswith(".jsonl")]


def _faults(agents: list[dict[str, Any]]) -> int:
    """Of ranks, as their agents have seen them, and losses of nodes, which nobody there could see."""
    faults = [event["reason"] for event in agents if event["event"] == "fault"]
    generations = {event["generation"]: event["reason"] for event in agents if event["event"] == "recover"}
    return len(faults) + sum(reason not in faults for reason in generations.values())


def text(summary: Summary) -> str:
    """A table of the recoveries and the totals."""
    lines = [f"{'step':>6} {'total s':>8}  " + " ".join(f"{phase:>8}" for phase in PHASES) + "  fault"]
    for recovery in summary.recoveries:
        seconds = recovery["seconds"]
        phases = " ".join(f"{seconds[phase]:8.3f}" for phase in PHASES)
        lines.append(f"{recovery['step']:6d} {sum(seconds.values()):8.3f}  {phases}  {recovery['reason']}")
    goodput = 100 * (1 - summary.recovery_s / summary.elapsed_s) if summary.elapsed_s > 0 else 100.0
    lines.append(f"{len(summary.recoveries)} recoveries of {summary.faults} faults in {summary.elapsed_s:.1f} s, "
                 f"{summary.recovery_s:.3f} s recovering ({goodput:.2f} % goodput), {summary.repeated_steps} steps repeated")  # fmt: skip
    return "\n".join(lines)
