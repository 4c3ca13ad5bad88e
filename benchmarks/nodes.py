"""A snapshot on two nodes, and a lost node's state back: seconds and CPU seconds per GiB, in a real job with FSDP2, and by itself.

One rank per node; agents talk over loopback. In one job every step is captured, sent to the other node and verified there
(`replication.when_behind: wait`). In another, with default options, a node is killed, again and again: a spare node fetches its state from
memory. Beside them, in the same run: memcpy, sockets that do nothing but move bytes, and the exchange of the agents alone (more of that in
`replication`).
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import MIB, Check, Report, main, number, progress
from benchmarks.nodes_faults import lose_nodes
from benchmarks.nodes_job import Mark, Recipe
from benchmarks.nodes_site import Site, marks, site, sizes
from benchmarks.replication import Process, bare_seconds, memcpy_seconds, node_process

_GIB = 1 << 30
_WIDTH = 2048
_STATE = 12
"""Bytes of state per parameter: float32, and AdamW's two moments."""
_WARM_UP = 2
_CPU, _LOAD_S = 1.2, 1.2


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured."""

    mib: int
    """State of a rank."""
    width: int
    steps: int
    """That are timed without a fault."""
    losses: int
    """Of nodes."""
    repeat: int
    """Of what is measured by itself."""

    def recipe(self, steps: int, gates: tuple[int, ...] = (), **options: object) -> Recipe:
        """The training."""
        depth = max(1, round(self.mib * MIB * 2 / _STATE / self.width**2))
        return Recipe("fsdp", 2, 1, self.width, depth, batch=2, steps=steps, gates=gates, options=dict(options))


_FULL = Size(mib=512, width=_WIDTH, steps=12, losses=3, repeat=5)
_QUICK = Size(mib=64, width=1024, steps=6, losses=1, repeat=3)


@dataclass(slots=True)
class Kept:
    """What the job without faults has told."""

    gib: float
    """Of both ranks, per step."""
    replicated: list[float]
    """Seconds from the optimizer's last write until both ranks' snapshots were acknowledged, by step."""
    captured: list[float]
    """Seconds from that write until the rank went on, by step and rank."""
    rank_cpu: float
    """CPU seconds of both ranks for what follows an optimizer's write, per step."""
    agent_cpu: float
    """CPU seconds of both agents, votes and all, per step."""


@dataclass(slots=True)
class Lost:
    """What the job whose nodes are killed has told."""

    phases: list[dict[str, float]]
    """Seconds of each recovery by phase."""
    whole: list[float]
    """Seconds from each kill until all ranks had completed another step."""


def _keep(place: Site, size: Size) -> Kept:
    job = place.run(size.recipe(size.steps, replication={"when_behind": "wait"}))
    window = range(_WARM_UP + 1, size.steps)  # the last step is left out: the job need not wait for it
    ranks = [_of_window(marks(job.directory, rank), window) for rank in range(2)]
    at = {(event["rank"], event["step"]): event["monotonic_ns"] for event in job.named("replicated")}
    seconds = [max(at[rank, mark.step] - mark.wrote_ns for rank, mark in enumerate(pair)) / 1e9 for pair in zip(*ranks, strict=True)]
    return Kept(
        sum(sizes(job.directory, rank)["travelling"] for rank in range(2)) / _GIB,
        seconds,
        [(mark.done_ns - mark.wrote_ns) / 1e9 for own in ranks for mark in own],
        sum(statistics.mean(mark.done_cpu_s - mark.wrote_cpu_s for mark in own) for own in ranks),
        sum((own[-1].agent_cpu_s - own[0].agent_cpu_s) / (len(own) - 1) for own in ranks),
    )


def _lose(place: Site, size: Size) -> Lost:
    gates = tuple(3 + 3 * loss for loss in range(size.losses))
    recipe = size.recipe(gates[-1] + 3, gates)
    job = place.start(recipe, spares=1)
    try:
        whole = lose_nodes(job, recipe)
    finally:
        job.stop()
    return Lost([recovery["seconds"] for recovery in job.recoveries], whole)


def _of_window(found: list[Mark], window: range) -> list[Mark]:
    return [mark for mark in found if mark.step in window]


def _alone(mib: int, repeat: int) -> dict[str, list[float]]:
    """Seconds of the exchange without a job, between processes of their own."""
    agents: list[Process] = [node_process(f"node-{number}", mib * MIB) for number in range(3)]
    try:
        peers = {number: (f"node-{number}", agent.ask("port")) for number, agent in enumerate(agents)}
        for number, agent in enumerate(agents):
            agent.ask("open", peers, number)
        agents[0].ask("make", 0)
        sent = []
        for step in range(repeat + 2):
            captured, _ = agents[0].ask("capture", step)
            sent.append(captured + agents[0].ask("replicate", 0, step, 1)[0])
        fetched = [agents[2].ask("fetch", 0, repeat + 1, [1])[0] for _ in range(repeat)]
    finally:
        for agent in agents:
            agent.close()
    return {"exchange alone: capture, send, verify": sent[2:], "exchange alone: fetch": fetched}


def _report(
    report: Report, size: Size, found: Kept, lost: Lost, alone: dict[str, list[float]], bare: tuple[list[float], list[float]]
) -> None:
    of = f"{size.mib} MiB per rank"
    report.spreads(f"{of}: seconds", {
        "memcpy": memcpy_seconds(size.mib * MIB, size.repeat), "bare sockets, one way": bare[0], **alone,
        "job: the rank goes on after (snapshot taken)": found.captured, "job: both ranks' snapshots acknowledged after": found.replicated,
        "job: node lost, `restore` (fetched and put back)": [phases["restore"] for phases in lost.phases],
        "job: node lost, until all have completed another step": lost.whole,
    })  # fmt: skip
    names = list(lost.phases[0])
    report.spreads("Node lost: seconds by phase", {name: [phases[name] for phases in lost.phases] for name in names})
    cpu = (found.rank_cpu + found.agent_cpu) / found.gib
    both = [value / (size.mib / 1024) for value in bare[1]]
    parts = {"ranks: capture, hash, wait": found.rank_cpu / found.gib, "agents: send, receive, verify, vote": found.agent_cpu / found.gib,
             "bare sockets, both ends": statistics.median(both)}  # fmt: skip
    rows = [[name, number(value)] for name, value in parts.items()]
    report.table("CPU seconds per GiB saved and replicated, means over the job", ["", "s/GiB"], rows)
    report.check(Check(f"CPU per GiB saved and replicated, in the job, {of}", cpu, _CPU, unit=" s/GiB"))
    loaded = statistics.median(phases["restore"] for phases in lost.phases)
    report.check(Check(f"load after a node loss, in the job, {of}", loaded, _LOAD_S, unit=" s"))
    fetched = statistics.median(alone["exchange alone: fetch"])
    report.check(Check(f"load after a node loss, exchange alone, {of}", fetched, _LOAD_S, unit=" s"))
    report.say(
        "The clock of a snapshot starts at the optimizer's last write and stops when the other node has verified and acknowledged it. In "
        "the job both nodes send and receive at the same time, beside the training's own traffic and computation, on the same cores. CPU "
        "seconds of ranks are those of the whole process from that write to the next step; those of agents are all they have spent."
    )


def measure(quick: bool) -> Report:
    """Run it."""
    report, size = Report("nodes", "Snapshots on two nodes, and a lost node's state back", quick), _QUICK if quick else _FULL
    progress("bare sockets, and the exchange alone")
    bare, alone = bare_seconds(size.mib * MIB, size.repeat), _alone(size.mib, size.repeat)
    with tempfile.TemporaryDirectory(prefix="gemini-bench-") as name, site(Path(name)) as place:
        progress("a job with FSDP2 on two nodes")
        kept = _keep(place, size)
        progress(f"another one, {size.losses} of whose nodes die")
        lost = _lose(place, size)
    _report(report, size, kept, lost, alone, bare)
    return report


if __name__ == "__main__":
    main(__doc__, measure)
