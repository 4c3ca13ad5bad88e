"""From the loss of a node to the next completed step: killed and cut off, by phase; against a restart of everything, and torchrun's.

Two nodes with one rank each, and a spare node. The baselines, in the same run: all nodes are killed and started again from the persistent
checkpoint of the very step (forked processes, so without imports); and torchrun on two nodes, one of which is killed and started again at
once, with Lightning's ddp and a ModelCheckpoint of every step.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import Check, Report, main, progress
from benchmarks.nodes_faults import cut_node, lose_nodes, restart
from benchmarks.nodes_job import Recipe
from benchmarks.nodes_site import NoNamespaces, Site, site
from benchmarks.nodes_torchrun import lose_nodes_of_torchrun

_FIRST, _APART = 3, 3
_KILLED_S, _RATIO = 3.0, 3.0
_WIDTH, _DEPTH = 512, 4
_IMPORT_S = 60.0
Phases = list[dict[str, float]]


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured."""

    kills: int
    cuts: int
    restarts: int
    torchrun: int


_FULL = Size(kills=10, cuts=3, restarts=4, torchrun=3)
_QUICK = Size(kills=1, cuts=1, restarts=1, torchrun=1)


def _recipe(kind: str, faults: int, **options: dict[str, object]) -> Recipe:
    gates = tuple(_FIRST + _APART * fault for fault in range(faults))
    return Recipe(kind, 2, 1, _WIDTH, _DEPTH, batch=8, steps=gates[-1] + 3, gates=gates, options=dict(options))


def _killed(place: Site, kind: str, count: int) -> tuple[list[float], Phases]:
    recipe = _recipe(kind, count)
    job = place.start(recipe, spares=1)
    try:
        seconds = lose_nodes(job, recipe)
    finally:
        job.stop()
    return seconds, [recovery["seconds"] for recovery in job.recoveries]


def _restarted(place: Site, kind: str, count: int) -> list[float]:
    found = []
    for number in range(count):
        persistent: dict[str, object] = {"url": str(place.directory / f"store-{kind}-{number}"), "every_n_steps": _FIRST}
        found.append(restart(place, _recipe(kind, 1, persistent=persistent)))
    return found


def _cut(base: Path, count: int) -> tuple[list[float], Phases]:
    """Raises `NoNamespaces`."""
    with site(base, namespaces=3) as place:
        found = [cut_node(place, _recipe("fsdp", 1)) for _ in range(count)]
    return [seconds for seconds, _ in found], [phases for _, phases in found]


def _imports(count: int) -> list[float]:
    """Seconds that two processes at once, one for each node, take to import what a training script imports."""
    found = []
    for _ in range(count):
        began = time.monotonic()
        both = [subprocess.Popen([sys.executable, "-c", "import lightning.pytorch, lightning_gemini"]) for _ in range(2)]
        if any([process.wait(_IMPORT_S) for process in both]):
            raise RuntimeError("a process could not import lightning_gemini")
        found.append(time.monotonic() - began)
    return found


def _phases(report: Report, title: str, found: Phases) -> None:
    report.spreads(f"{title}: seconds by phase", {name: [phases[name] for phases in found] for name in found[0]})


def measure(quick: bool) -> Report:
    """Run it."""
    report, size = Report("nodes-recovery", "From the loss of a node to the next completed step", quick), _QUICK if quick else _FULL
    series: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="gemini-bench-") as name:
        base = Path(name)
        with site(base / "loopback") as place:
            for kind in ("fsdp", "ddp"):
                progress(f"{size.kills} nodes are killed, {kind}")
                series[f"killed, {kind}"], phases = _killed(place, kind, size.kills)
                _phases(report, f"Killed, {kind}", phases)
                progress(f"{size.restarts} restarts of everything, {kind}")
                series[f"everything restarted from storage, {kind}"] = _restarted(place, kind, size.restarts)
        progress(f"{size.cuts} cables are pulled")
        try:
            series["cut off, fsdp"], phases = _cut(base / "namespaces", size.cuts)
            _phases(report, "Cut off, fsdp", phases)
        except NoNamespaces as error:
            report.say(f"No cable was pulled: {error}.")
        progress(f"{size.torchrun} nodes of torchrun are killed")
        series["torchrun, node restarted, ddp"] = lose_nodes_of_torchrun(base / "torchrun", size.torchrun)
    series["to import Lightning (in no row above but torchrun's)"] = imports = _imports(size.restarts)
    report.spreads("Seconds until all ranks have completed another step", series)
    middle = {what: statistics.median(seconds) for what, seconds in series.items()}
    for kind in ("fsdp", "ddp"):
        report.check(Check(f"node killed, {kind}: median", middle[f"killed, {kind}"], _KILLED_S, unit=" s"))
        restarted = middle[f"everything restarted from storage, {kind}"] + statistics.median(imports)
        ratio = restarted / middle[f"killed, {kind}"]
        report.check(Check(f"times faster than imports and a restart from storage, {kind}", ratio, _RATIO, at_least=True))
    ratio = middle["torchrun, node restarted, ddp"] / middle["killed, ddp"]
    report.check(Check("times faster than torchrun (imports included), ddp", ratio, _RATIO, at_least=True))
    report.say(
        f"An MLP of about {_DEPTH * _WIDTH**2 / 1e6:.0f} million parameters, AdamW, one thread per rank. A spare node has run the script "
        "up to `fit` when a node is lost. A node that is cut off is only missed when its lease in etcd has run out "
        "(`membership.lease_ttl_s`, 4 s by default): that is its `detect`. A restart of everything is measured at its best: the step was "
        "in storage just before, all processes are forked, nobody waits for a scheduler. torchrun: c10d rendezvous, default settings, the "
        "killed node is never the one with the store (whose loss ends such a job)."
    )
    return report


if __name__ == "__main__":
    main(__doc__, measure)
