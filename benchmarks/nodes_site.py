"""Where the jobs of `nodes_job` run, and what they leave.

Processes are forked from the benchmark, one agent and its ranks per node, as the tests do it: what imports cost is in no figure. Nodes are
addresses of loopback, or network namespaces.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl

from benchmarks.nodes_job import Mark, Recipe, Strategist, our_strategy, script
from tests.support.cluster import JobOnNodes, on_nodes
from tests.support.etcd import Etcd
from tests.support.nodes import Nodes

_ETCD = ("--heartbeat-interval", "10", "--election-timeout", "100", "--unsafe-no-fsync")
_LIMIT_S = 180.0


class NoNamespaces(RuntimeError):
    """This machine, or this user, cannot make network namespaces."""


@dataclass(slots=True)
class Site:
    """An etcd, and a folder for jobs; with `nodes`, network namespaces for them, the last one of which has the etcd."""

    directory: Path
    url: str
    nodes: Nodes | None = None

    def start(self, recipe: Recipe, *callbacks: pl.Callback, spares: int = 0, strategy: Strategist = our_strategy) -> JobOnNodes:
        """A job under way; the caller ends it with `stop`."""
        directory = self.directory / f"job-{uuid.uuid4().hex[:8]}"
        target = script(directory, recipe, *callbacks, strategy=strategy)
        return on_nodes(directory, [self.url], target, recipe.nodes, recipe.per_node, spares, nodes=self.nodes)

    def run(self, recipe: Recipe, *callbacks: pl.Callback, strategy: Strategist = our_strategy) -> JobOnNodes:
        """A job without faults, to its end."""
        job = self.start(recipe, *callbacks, strategy=strategy)
        ended(job)
        return job


def ended(job: JobOnNodes, lost: tuple[int, ...] = ()) -> None:
    """Wait for the end of a job. Raises with its last words when a node other than those that are lost has failed."""
    try:
        statuses = job.wait(_LIMIT_S)
    finally:
        job.stop()
    if failed := {number: status for number, status in statuses.items() if status and number not in lost}:
        raise RuntimeError(f"nodes ended with {failed}:\n{job.outputs()}")


@contextlib.contextmanager
def site(directory: Path, namespaces: int = 0) -> Iterator[Site]:
    """A site on loopback, or one with so many namespaces for nodes. Raises `NoNamespaces`."""
    directory.mkdir(parents=True, exist_ok=True)
    if not namespaces:
        etcd = Etcd(directory / "etcd", flags=_ETCD)
        try:
            yield Site(directory, etcd.url)
        finally:
            etcd.stop()
        return
    try:
        nodes = Nodes(namespaces + 1)
    except OSError as error:
        raise NoNamespaces(f"network namespaces cannot be made here: {error}") from None
    try:
        server = Etcd(directory / "etcd", host=nodes.address(namespaces), port=2379, flags=_ETCD, start=False)
        running = nodes.exec(namespaces, "sh", "-c", f"exec {shlex.join(server.command)} >{directory}/etcd.log 2>&1")
        try:
            yield Site(directory, server.url, nodes)
        finally:
            running.kill()
            running.communicate()
    finally:
        nodes.close()


# ---- what jobs leave


def marks(directory: Path, rank: int) -> list[Mark]:
    """The completed steps of a rank, in the order of time; a torn line is left out."""
    path = directory / f"marks-rank{rank}.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [Mark(*json.loads(line)) for line in lines if line.startswith("[") and line.endswith("]")]


def sizes(directory: Path, rank: int) -> dict[str, int]:
    """Bytes of a rank's state: `held` on its device, `owned` in its arena, `travelling` to each peer."""
    found: dict[str, int] = json.loads((directory / f"sizes-rank{rank}.json").read_text())
    return found


def passed(job: JobOnNodes, step: int) -> bool:
    """Whether all ranks have completed `step` steps, so that they wait at its gate."""
    return all(any(mark.step >= step for mark in marks(job.directory, rank)) for rank in range(job.count * job.per_node))


def replicated(job: JobOnNodes, step: int) -> bool:
    """Whether the snapshots of a step are kept by the peers of all ranks."""
    return len({event["rank"] for event in job.named("replicated") if event["step"] >= step}) == job.count * job.per_node


def open_gate(job: JobOnNodes, step: int) -> None:
    """The ranks go on."""
    (job.directory / f"go-{step}").touch()


def spare_ready(job: JobOnNodes, number: int) -> bool:
    """Whether the processes of a spare node have run the script up to `fit`."""
    return len(job.named_of(number, "spare_ready")) >= job.per_node


def completed_after(directory: Path, world: int, step: int, since_ns: int) -> float:
    """Seconds from `since_ns` until all ranks have completed the step after `step`, for the first time since then."""
    done = [min((m.done_ns for m in marks(directory, rank) if m.step > step and m.done_ns > since_ns), default=0) for rank in range(world)]
    return (max(done) - since_ns) / 1e9 if all(done) else float("inf")


def kill(job: JobOnNodes, number: int) -> int:
    """All processes of a node at once; the moment before, in monotonic ns."""
    now = time.monotonic_ns()
    job.kill(number)
    return now
