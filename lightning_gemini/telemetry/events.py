"""One JSONL file of events per process: the raw material of every summary.

Seam: `EventLog.emit(name, **fields)` appends one line with the wall clock and the machine's monotonic clock (comparable between the
processes of a node). A write that fails (disk full, folder gone) is reported once and telemetry goes silent: it must never stop training.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

PHASES = ("detect", "abort", "restore", "regroup", "resume")
"""Of a recovery, in order."""


class EventLog:
    """Appends events to `<directory>/<name>.jsonl`; lines are whole, also when several processes share a file in turn.
    `job` tells the runs of one folder apart."""

    def __init__(self, directory: str, name: str, job: str = "") -> None:
        self.job = job
        self.path = os.path.join(directory, f"{name}.jsonl")
        self._fd: int | None = None
        os.makedirs(directory, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        size = os.fstat(self._fd).st_size
        if size and os.pread(self._fd, 1, size - 1) != b"\n":  # a predecessor was killed in the middle of a line
            os.write(self._fd, b"\n")

    def emit(self, event: str, **fields: Any) -> None:
        """Append one event."""
        if self._fd is None:
            return
        line = {"event": event, "time": time.time(), "monotonic_ns": time.monotonic_ns(), "pid": os.getpid(), "job": self.job, **fields}
        try:
            os.write(self._fd, (json.dumps(line) + "\n").encode())
        except OSError as error:
            print(f"lightning_gemini: cannot write {self.path}: {error}; telemetry stops, training goes on", file=sys.stderr)
            self.close()

    def close(self) -> None:
        """Close the file."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def read_events(path: str) -> list[dict[str, Any]]:
    """The events of one file, oldest first. A torn last line (a kill in the middle of a write) is left out."""
    events = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                events.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return events
