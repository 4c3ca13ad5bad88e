"""Save and replicate between two processes: ours against lm-resiliency, another implementation of Gemini's in-memory checkpoints.

Both processes save their state and send it to each other at the same time, over loopback. lm-resiliency wants an environment of its own:
`LM_RESILIENCY_PYTHON` names its interpreter (`python3 -m venv DIR && DIR/bin/pip install torch==2.13.0 lm-resiliency`). Without it only our
side is measured.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
import time

from benchmarks.common import MIB, ROOT, Check, Report, main, progress
from benchmarks.replication import bare_seconds, memcpy_seconds, node_process
from tests.support.meeting import free_port

_LIMIT_S = 240.0
_VARIABLE = "LM_RESILIENCY_PYTHON"
_JOB = ROOT / "benchmarks" / "nodes_rival_job.py"
Found = list[tuple[float, float, float]]
"""Of each save: seconds until the training may go on, until both are replicated, CPU seconds of both processes."""


def _ours(mib: int, repeat: int) -> Found:
    """The agents' exchange, with checksums; each process captures as a rank does, then sends as an agent does."""
    nodes = [node_process(f"node-{number}", mib * MIB) for number in range(2)]
    try:
        peers = {number: (f"node-{number}", node.ask("port")) for number, node in enumerate(nodes)}
        for number, node in enumerate(nodes):
            node.ask("open", peers, number)
            node.ask("make", number)
        found = []
        for step in range(repeat + 2):
            cpu, began = sum(node.ask("cpu") for node in nodes), time.perf_counter()
            for node in nodes:
                node.begin("capture", step)
            captured = max(node.end()[0] for node in nodes)
            for number, node in enumerate(nodes):
                node.begin("replicate", number, step, 1 - number)
            for node in nodes:
                node.end()
            took = time.perf_counter() - began
            found.append((captured, took, sum(node.ask("cpu") for node in nodes) - cpu))
    finally:
        for node in nodes:
            node.close()
    return found[2:]  # both slots have been written once


def _theirs(python: str, folder: str, mib: int, repeat: int) -> Found:
    """Raises `OSError` or `RuntimeError` with the reason why it cannot be measured."""
    port, environment = free_port(), {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [[python, str(_JOB), folder, *map(str, (rank, port, mib, repeat))] for rank in range(2)]
    both = [subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for line in command]
    try:
        said = [process.communicate(timeout=_LIMIT_S) for process in both]
    finally:
        for process in both:
            process.kill()
            process.wait()
    for process, (_, error) in zip(both, said, strict=True):
        if process.returncode:
            raise RuntimeError(f"exit status {process.returncode}: {error.strip().splitlines()[-1]}")
    ranks = [json.loads(out.splitlines()[-1]) for out, _ in said]
    return [(max(a[0], b[0]), max(a[1], b[1]), a[2] + b[2]) for a, b in zip(*ranks, strict=True)]


def measure(quick: bool) -> Report:
    """Run it."""
    mib, repeat = (64, 3) if quick else (512, 7)
    report = Report("nodes-rival", "Save and replicate: ours against lm-resiliency", quick)
    progress("ours")
    sides = {"ours (checksums verified)": _ours(mib, repeat)}
    python = os.environ.get(_VARIABLE)
    if python is None:
        report.say(f"lm-resiliency was not measured: {_VARIABLE} does not name an interpreter that has it.")
    else:
        progress("lm-resiliency")
        try:
            with tempfile.TemporaryDirectory(prefix="gemini-bench-") as folder:
                sides["lm-resiliency (no checksums)"] = _theirs(python, folder, mib, repeat)
        except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
            report.say(f"lm-resiliency was not measured: {error}")
    _tell(report, mib, repeat, sides)
    return report


def _tell(report: Report, mib: int, repeat: int, sides: dict[str, Found]) -> None:
    gib = 2 * mib / 1024
    bare, bare_cpu = bare_seconds(mib * MIB, repeat)
    of = f"{mib} MiB in each of two processes"
    titles = (f"{of}: seconds until the training may go on", f"{of}: seconds until both are replicated", "All processes: CPU s per GiB")
    beside = ({"memcpy, one process": memcpy_seconds(mib * MIB, repeat)}, {"bare sockets, one way": bare},
              {"bare sockets": [value / (gib / 2) for value in bare_cpu]})  # fmt: skip
    for column, title in enumerate(titles):
        scale = 1 / gib if column == 2 else 1.0
        report.spreads(title, {**{name: [save[column] * scale for save in found] for name, found in sides.items()}, **beside[column]})
    if len(sides) == 2:
        mine, theirs = ([statistics.median(column) for column in zip(*found, strict=True)] for found in sides.values())
        for name, a, b in zip(("until the training may go on", "until replicated", "CPU"), mine, theirs, strict=True):
            report.check(Check(f"{name}: ours / lm-resiliency", a / b, 1.0))
    report.say(
        "Ours captures (copies and hashes) into shared memory that outlives the rank; the peer checks each block before it acknowledges. "
        "lm-resiliency copies into memory of the training process, sends it in chunks of 16 MiB with gloo from a thread there, and checks "
        "sums on disk only; what a process keeps, its peer's state too, is gone when that process is killed. Neither side trains here."
    )


if __name__ == "__main__":
    main(__doc__, measure)
