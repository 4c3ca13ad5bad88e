"""A peer that cannot be in the job is told so, once, before it starts a process; nobody else hears of it."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_gemini.agent.decision import decide
from lightning_gemini.membership.etcd import EtcdMembership
from lightning_gemini.membership.records import VERSION, NodeInfo
from tests.multinode.models import Recipe, Strike
from tests.multinode.network import Network, held
from tests.support.cluster import JobOnNodes

DDP = Recipe("ddp", 2)


def refused(job: JobOnNodes, said: str, **options: Any) -> None:
    """Node 2 comes as a spare and leaves with an error; it has started nothing."""
    before = len(job.output(2))
    job.start(2, spare=True, **options)
    job.until(lambda: 2 not in job.agents, "the end of node 2")
    text = job.output(2)[before:]
    assert job.statuses.pop(2) == 2 and not job.alive(2)
    assert text.startswith("lightning-gemini: ") and text.count("\n") == 1 and said in text, text
    assert "on node 10.77.0.1-" in text or "on node 10.77.0.2-" in text, "it does not say who is different"


def another_version(network: Network, job: JobOnNodes) -> None:
    """It comes through the membership itself, as a later version of this package would."""
    url = job.etcd[0]
    membership = EtcdMembership([url], job.directory.name, 2, decide, None)  # type: ignore[arg-type]  # is refused before it is told anything
    info = NodeInfo(node="later", host=network.nodes.address(2), port=1, ranks_per_node=1, spare=True, version=VERSION + 1)
    try:
        with pytest.raises(ValueError, match=r"version=.*install the same version of lightning_gemini on every node"):
            network.nodes.within(2, lambda: membership.join(info))
    finally:
        network.nodes.within(2, membership.close)


def test_peers_that_do_not_fit(network: Network) -> None:
    def during(job: JobOnNodes) -> None:
        held(job)
        refused(job, "start the same number of ranks on every node", ranks_per_node=2)
        job.tokens[2] = b"another secret"
        refused(job, "give every node the same secret, in LIGHTNING_GEMINI_TOKEN or --token-file")
        del job.tokens[2]
        job.scripts[2] = "another script"
        refused(job, "start the same command line")
        another_version(network, job)
        assert "another secret" not in job.outputs()
        (job.directory / "go").touch()

    job = network.run(DDP, 2, Strike("forward", 0, 3, kind="wait"), during=during)
    network.same(DDP, job)
