"""Saves what a campaign has found as a dated table beside the benchmarks."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

import pytest

ROWS: list[tuple[str, str, int, int, float, float]] = []
"""kind, where, runs, recoveries, median and longest seconds of a recovery."""
_TARGET = Path(__file__).parents[2] / "docs" / "benchmarks"


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if not ROWS or "GEMINI_CHAOS" not in os.environ:
        return
    today = datetime.date.today().isoformat()
    lines = ["| {} | {} | {} | {} | {:.3f} | {:.3f} |".format(*row) for row in ROWS]
    total = sum(row[3] for row in ROWS)
    text = [
        f"# Campaign of faults, {today}",
        f"{total} recoveries in {sum(row[2] for row in ROWS)} runs of 4 ranks on {os.cpu_count()} cores, each run bit-identical to the "
        f"undisturbed one; {session.testsfailed} of {session.testscollected} campaigns failed and are not in the table. Made by "
        "`make chaos`.",
        "| fault | where | runs | recoveries | median (s) | longest (s) |\n|---|---|---|---|---|---|\n" + "\n".join(lines),
    ]
    (_TARGET / f"{today}-chaos.md").write_text("\n\n".join(text) + "\n")
