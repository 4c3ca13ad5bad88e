"""Kill and re-form, two hundred times: from a rank's death to the first good collectives of all ranks, below Lightning.

Four ranks with a default group, a group of their own and a DeviceMesh; ranks are killed (SIGKILL) or stopped (SIGSTOP: decided at once,
killed after the others were told) in turn, rank 0 included; a warm spare takes the place. Rank 2 is never touched: its descriptors,
threads and memory must stay where they were. The baseline is a whole restart of the same four ranks, forked warm, over TCPStore.
"""

from __future__ import annotations

import statistics
import time

from benchmarks.common import Check, Report, Spread, main, progress
from benchmarks.reforming import Job
from benchmarks.rendezvous import alone, init

SIZE, WITNESS = 4, 2
_VICTIMS = (0, 1, 3)
_TARGET_MS = 150.0


def _cycle(job: Job, number: int) -> tuple[str, float, float]:
    stopped = number % 2 == 1
    struck, decided = job.replace(_VICTIMS[number % len(_VICTIMS)], stopped=stopped)
    good = max(told.at_ns for told in job.good())
    return ("SIGSTOP" if stopped else "SIGKILL"), (good - struck) / 1e6, (good - decided) / 1e6


def measure(quick: bool) -> Report:
    """Run it."""
    report = Report("reform", "Kill-and-re-form cycles", quick)
    cycles = 10 if quick else 200
    times: dict[str, list[float]] = {"SIGKILL": [], "SIGSTOP": []}
    witness = []
    with Job(SIZE) as job:
        job.good()
        for number in range(cycles):
            kind, since_fault, _ = _cycle(job, number)
            times[kind].append(since_fault)
            witness.append(_look(job))
            if number % 50 == 49:
                progress(f"{number + 1} cycles")
    every = times["SIGKILL"] + times["SIGSTOP"]
    progress("the baseline: a new start over TCPStore")
    restarts = [1e3 * _restart() for _ in range(3 if quick else 15)]
    report.spreads("From the fault to the first good collectives of all ranks on three groups (ms)", times | {"both": every})
    report.spreads("Beside it (ms): four warm ranks start anew over TCPStore, one group, no collective", {"start": restarts})
    ratio = statistics.median(every) / statistics.median(restarts)
    report.say(
        "That start is what remains of a restart when imports, model, data and state cost nothing; re-forming, with its detection, its "
        f"three groups and their first collectives, takes {ratio:.1f} times as long."
    )
    spread = Spread.of(every)
    report.check(Check(f"median of {cycles} cycles", spread.median, _TARGET_MS, unit=" ms"))
    window = min(5, cycles // 2)  # what the last generation had may be closing still when a rank looks: the least of several looks
    first, last = ([min(column) for column in zip(*looks, strict=True)] for looks in (witness[:window], witness[-window:]))
    report.table("The rank that was never touched",
                 ["", "descriptors", "threads", "listening sockets", "RSS (MiB)", "asleep in gloo"],
                 [["in the first cycles", *map(str, first)], ["in the last", *map(str, last)]])  # fmt: skip
    for name, before, after in zip(("descriptors", "threads", "listening sockets"), first, last, strict=False):
        report.check(Check(f"more {name} after {cycles} cycles", after - before, 3))
    report.check(Check("RSS after / before", last[3] / first[3], 1.05))
    return report


def _look(job: Job) -> tuple[int, int, int, int, int]:
    told = job.last[WITNESS]
    return told.descriptors, told.threads, told.listeners, told.rss >> 20, told.asleep


def _restart() -> float:
    begun = time.monotonic()
    init("TCPStore", SIZE)
    return time.monotonic() - begun


if __name__ == "__main__":
    alone("benchmarks.reform")
    main(__doc__, measure)
