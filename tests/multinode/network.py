"""A laboratory whose nodes have network namespaces of their own, with etcd in others: links are cut, slowed, and lost in one direction."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_gemini.telemetry.events import read_events
from tests.multinode.lab import Expected, Lab
from tests.multinode.models import Recipe, Strike, script
from tests.support.cluster import JobOnNodes, on_nodes
from tests.support.etcd import Cluster, Etcd
from tests.support.nodes import Nodes

NODES = 5
"""For the job; those after them have an etcd each."""
QUICK = ("--heartbeat-interval", "10", "--election-timeout", "100", "--unsafe-no-fsync")
CALM = ("--heartbeat-interval", "50", "--election-timeout", "500", "--unsafe-no-fsync")


@dataclass
class Network(Lab):
    """See the module's docstring."""

    nodes: Nodes = field(kw_only=True)
    servers: list[Etcd] = field(kw_only=True)

    @classmethod
    def make(cls, directory: Path, expected: Expected, servers: int) -> Network:
        """With one etcd of so many servers, each on a node of its own."""
        nodes = Nodes(NODES + servers)
        places = [(nodes, NODES + i) for i in range(servers)]
        try:
            if servers == 1:
                found = [Etcd(directory / "etcd", flags=QUICK, place=places[0])]
            else:
                found = Cluster(directory, servers, places=places, flags=CALM).members
        except BaseException:
            nodes.close()
            raise
        return cls(directory, found[0], expected, nodes=nodes, servers=found)

    def start(
        self, recipe: Recipe, nodes: int, *strikes: Strike, spares: int = 0, membership: dict[str, Any] | None = None, **options: Any
    ) -> JobOnNodes:
        """See `Lab`."""
        directory, per_node = self.job_directory(), recipe.world // nodes
        target = script(directory, nodes, per_node, recipe, *strikes, **options)
        urls = [server.url for server in self.servers]
        return on_nodes(directory, urls, target, nodes, per_node, spares=spares, membership=membership or {}, nodes=self.nodes)

    def job_directory(self) -> Path:
        """Of one more job, which is named after it."""
        return self.directory / f"job-{time.time_ns()}"

    def close(self) -> None:
        """End the servers, remove the nodes."""
        for server in self.servers:
            server.stop()
        self.nodes.close()


def held(job: JobOnNodes, number: int = 0) -> None:
    """A rank is at a strike."""
    job.until(lambda: (job.directory / f"struck-{number}").exists(), "a strike")


def noticed_s(job: JobOnNodes, number: int, since_ns: int, event: str = "recover") -> float:
    """Seconds from a moment (`time.monotonic_ns`) to the next event of a node, which is waited for."""

    def found() -> list[int]:
        return [int(told["monotonic_ns"]) for told in job.named_of(number, event) if told["monotonic_ns"] > since_ns]

    job.until(lambda: bool(found()), f"{event} on node {number}")
    return (found()[0] - since_ns) / 1e9


def ends_its_ranks(job: JobOnNodes, number: int, since_ns: int) -> float:
    """Seconds until a node was expelled; then none of the processes that it had is left but its agent."""
    processes = {event["pid"] for event in rank_events(job) if event["event"] == "joined" and event["rank"] in ranks_of(job, number)}
    took_s = noticed_s(job, number, since_ns, "expelled")
    job.until(lambda: not processes & {*job.alive(number)}, f"the end of the ranks of node {number}")
    return took_s


def ranks_of(job: JobOnNodes, number: int) -> range:
    """Of a node that has the place it was started with."""
    return range(number * job.per_node, (number + 1) * job.per_node)


def rank_events(job: JobOnNodes) -> list[dict[str, Any]]:
    """Of all ranks."""
    files = sorted((job.directory / "gemini").glob("rank*.jsonl"))
    return [{"rank": int(path.stem[4:]), **event} for path in files for event in read_events(str(path))]
