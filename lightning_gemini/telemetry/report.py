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
    """Read a run's folder."""
    path = os.path.join(directory, "agent.jsonl")
    if not os.path.exists(path):
        raise ValueError(f"{directory!r} has no agent.jsonl: give the telemetry.directory of a run (default: <default_root_dir>/gemini)")
    agent = read_events(path)
    begin = max(i for i, event in enumerate(agent) if event["event"] == "start")  # the newest run of the folder
    agent = agent[begin:]
    started, job = agent[0]["time"], agent[0]["job"]
    recoveries = [event for event in agent if event["event"] == "recovered"]
    pids: dict[int, list[int]] = {}
    injected = 0
    for name in sorted(os.listdir(directory)):
        if not (name.startswith("rank") and name.endswith(".jsonl")):
            continue
        events = [event for event in read_events(os.path.join(directory, name)) if event["job"] == job]
        joined = [event for event in events if event["event"] == "joined"]
        if joined:
            pids[joined[0]["rank"]] = list(dict.fromkeys(event["pid"] for event in joined))
        injected += sum(event["event"] == "fault_injected" for event in events)
    return Summary(
        elapsed_s=agent[-1]["time"] - started,
        faults=sum(event["event"] == "fault" for event in agent),
        injected=injected,
        recoveries=recoveries,
        repeated_steps=sum(event["repeated_steps"] for event in recoveries),
        pids=pids,
    )


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
