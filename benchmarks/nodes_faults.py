"""How the benchmarks make nodes of a job go away: killed, or cut off; and all of them at once, with a restart from storage.

Each clock starts an instant before the fault and stops when every rank has completed a step that no rank had completed before. Faults
strike where the snapshot of the last step is replicated, or persisted, just after the ranks were let into the next one.
"""

from __future__ import annotations

import functools
import time
from dataclasses import replace

from benchmarks.nodes_job import Recipe
from benchmarks.nodes_site import Site, completed_after, ended, kill, open_gate, passed, replicated, spare_ready
from tests.support.cluster import JobOnNodes

_LIMIT_S = 120.0


def lose_nodes(job: JobOnNodes, recipe: Recipe) -> list[float]:
    """At each gate a node is killed, its places in turn, and a spare takes over. Seconds until all ranks go on; ends with the job."""
    here, gone, seconds = list(range(recipe.nodes)), [], []
    for turn, gate in enumerate(recipe.gates):
        place, spare = (turn + 1) % recipe.nodes, recipe.nodes + turn
        _wait_at(job, gate, spare)
        open_gate(job, gate)
        at = kill(job, here[place])
        gone.append(here[place])
        here[place] = spare
        if turn + 1 < len(recipe.gates):
            job.start(spare + 1, spare=True)
        seconds.append(_went_on(job, recipe, gate, at))
    ended(job, tuple(gone))
    if len(job.recoveries) != len(recipe.gates):
        raise RuntimeError(f"{len(recipe.gates)} nodes were killed, {len(job.recoveries)} recoveries followed:\n{job.outputs()}")
    return seconds


def cut_node(place: Site, recipe: Recipe) -> tuple[float, dict[str, float]]:
    """The cable of node 1 is pulled at the first gate. Seconds until all ranks go on, and by phase."""
    assert place.nodes is not None
    (gate,) = recipe.gates
    job = place.start(recipe, spares=1)
    try:
        _wait_at(job, gate, recipe.nodes)
        at = time.monotonic_ns()
        place.nodes.cut(1)
        open_gate(job, gate)
        seconds = _went_on(job, recipe, gate, at)
        place.nodes.mend(1)
        ended(job, (1,))
        (recovery,) = job.recoveries
    finally:
        place.nodes.mend(1)
        job.stop()
    return seconds, recovery["seconds"]


def restart(place: Site, recipe: Recipe) -> float:
    """All nodes are killed at the first gate, when its step is in storage, and started again at once. Seconds until all ranks go on."""
    (gate,) = recipe.gates
    job = place.start(recipe)
    try:
        job.until(lambda: any(event["step"] == gate for event in job.named("checkpoint")), f"the checkpoint of step {gate}", _LIMIT_S)
        open_gate(job, gate)
        at = min([kill(job, number) for number in list(job.agents)])
    finally:
        job.stop()
    again = place.start(replace(recipe, gates=()))
    try:
        seconds = _went_on(again, recipe, gate, at)
        ended(again)
    finally:
        again.stop()
    return seconds


def _wait_at(job: JobOnNodes, gate: int, spare: int) -> None:
    def ready() -> bool:
        return passed(job, gate) and replicated(job, gate) and spare_ready(job, spare)

    job.until(ready, f"the gate of step {gate}", _LIMIT_S)


def _went_on(job: JobOnNodes, recipe: Recipe, gate: int, at_ns: int) -> float:
    seconds = functools.partial(completed_after, job.directory, recipe.world, gate, at_ns)
    job.until(lambda: seconds() < float("inf"), f"a step after the fault in step {gate}", _LIMIT_S)
    return seconds()
