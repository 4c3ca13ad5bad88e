"""All copies of a shard are lost at once: everybody goes back to the last checkpoint, and hears how many steps that costs."""

from __future__ import annotations

import time

from tests.multinode.models import Recipe, Strike
from tests.multinode.network import Network, ends_its_ranks, held
from tests.support.cluster import JobOnNodes

THREE = Recipe("fsdp", 3)


def test_a_switch_takes_a_whole_placement_group_with_it(network: Network) -> None:
    """Nodes 0 and 1 keep each other's copies; spares take both places, node 2 keeps its process."""

    def during(job: JobOnNodes) -> None:
        held(job)
        job.until(lambda: bool(job.named("checkpoint")), "a checkpoint")
        job.until(lambda: all(job.named_of(number, "spare_ready") for number in (3, 4)), "two spare nodes")
        begun = time.monotonic_ns()
        network.nodes.part(0, 1)
        for number in (0, 1):
            ends_its_ranks(job, number, begun)
            job.kill(number)

    options = {"persistent": {"url": str(network.directory / "store"), "every_n_steps": 3}}
    strike = Strike("forward", 0, 5, kind="wait")
    job = network.run(THREE, 3, strike, spares=2, during=during, membership={"lease_ttl_s": 2}, **options)
    assert {(event["action"], event["target"], event["repeated_steps"]) for event in job.named("plan")} >= {("storage", 3, 2)}
    network.same(THREE, job, recoveries=len(job.recoveries), repeated=2, lost=[0, 1], replaced=[0, 1])
    assert "2 completed steps computed again" in job.output(2)
