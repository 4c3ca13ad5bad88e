"""A node's lives in its job: it joins, and after it was expelled it comes back, as a spare, for its place is another's.

Seam: `live(cluster, start) -> exit status`; `start` makes the supervisor of one life.

States: a life -> expelled -> the next life … -> the job is over. What the ranks had completed goes from life to life: when all nodes were
expelled at once, as by an etcd that was away for longer than a lease, the next plan knows what was lost, and nobody begins anew without a
word. What ends the lives: no etcd answers -> `ConnectionError`; the job is in etcd no more -> `ValueError`; both from `start`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lightning_gemini.agent.cluster import Cluster
from lightning_gemini.agent.supervisor import Supervisor


def live(here: Cluster, start: Callable[[Cluster], Supervisor]) -> int:
    """Run a node to the end of its job; returns the job's exit status."""
    while True:
        supervisor = start(here)
        status = supervisor.run()
        if status is not None:
            return status
        if supervisor.node.coordinator.generation.roster:  # before the job has begun, its place is still its own
            here = replace(here, node_rank=-1, spare=True, lost_step=supervisor.node.coordinator.lost_step)
