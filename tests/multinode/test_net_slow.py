"""A network that is slower than the training: replication lags behind, and what that costs is the user's choice."""

from __future__ import annotations

import time
from base64 import b64decode, b64encode

import msgspec

from lightning_gemini.membership.records import NodeInfo
from tests.multinode.lab import PREFIX
from tests.multinode.models import Recipe, Strike
from tests.multinode.network import Network, held
from tests.support.cluster import JobOnNodes

LONG, SHORT = Recipe("fsdp", 2, steps=10), Recipe("fsdp", 2)
FIRST, LAST = 3, 16
"""Steps between which the line is slow."""
CRAWL, SLOW = "2mbit", "8mbit"
"""A snapshot of a node has half a megabyte."""


def slow_down(network: Network, job: JobOnNodes, rate: str) -> None:
    """The agents' lines; what the ranks tell each other has another one."""
    key = f"{PREFIX}{job.directory.name}/nodes/"
    found = network.etcd.ask("kv/range", key=b64encode(key.encode()).decode(), range_end=b64encode(f"{key[:-1]}0".encode()).decode())
    nodes = [msgspec.msgpack.decode(b64decode(pair["value"]), type=NodeInfo) for pair in found["kvs"]]
    for number in (0, 1):
        network.nodes.slow_ports(number, rate, [info.port for info in nodes])


def seconds(network: Network, job: JobOnNodes, rate: str = "") -> float:
    """Between two strikes; an empty rate is that of the machine."""
    held(job)
    if rate:
        slow_down(network, job, rate)
    begun = time.monotonic()
    (job.directory / "go").touch()
    held(job, 1)
    return time.monotonic() - begun


def test_no_step_waits_and_a_lost_node_goes_back_to_what_was_replicated(network: Network) -> None:
    took: dict[bool, float] = {}
    for slow in (False, True):
        strikes = [Strike("forward", 0, FIRST, kind="wait"), Strike("forward", 1, LAST, kind="node" if slow else "mark")]

        def during(job: JobOnNodes, slow: bool = slow) -> None:
            took[slow] = seconds(network, job, CRAWL if slow else "")

        job = network.run(LONG, 2, *strikes, spares=1 if slow else 0, during=during)
        replicated = [event["step"] for event in job.named_of(1, "replicated")]
        print(f"{'slow' if slow else 'fast'}: {LAST - FIRST} steps in {took[slow]:.2f} s, replicated: {replicated}")
    assert took[True] < 3 * took[False] + 2, "steps waited for the network"
    between = [step for step in replicated if FIRST < step < LAST]
    assert len(between) < (LAST - FIRST) // 3, "the network was not slow"
    network.same(LONG, job, recoveries=1, repeated=range(1, LAST), lost=[1], replaced=[1])
    (recovery,) = job.recoveries
    assert recovery["step"] + recovery["repeated_steps"] == LAST
    assert "replication is slower than training" in job.outputs()


def test_steps_wait_where_that_was_chosen(network: Network) -> None:
    strikes = [Strike("forward", 0, 2, kind="wait"), Strike("forward", 1, 5)]

    def during(job: JobOnNodes) -> None:
        print(f"3 steps in {seconds(network, job, SLOW):.2f} s")

    job = network.run(SHORT, 2, *strikes, spares=1, during=during, replication={"when_behind": "wait"})
    replicated = {event["step"] for event in job.named("replicated")}
    assert replicated >= {3, 4}, "a step did not wait"
    network.same(SHORT, job, recoveries=1, repeated=range(2), lost=[1], replaced=[1])
