"""Nodes in network namespaces of their own, with etcd in another: cables are pulled."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.membership.conftest import QUICK, Start
from tests.membership.helpers import Process, reached, watch
from tests.support.etcd import Etcd, require_etcd
from tests.support.nodes import Nodes, require_namespaces


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    """Node 0 has an etcd."""
    require_namespaces()
    require_etcd()
    made = Nodes(4)
    server = Etcd(tmp_path, host=made.address(0), port=2379, flags=QUICK, start=False)
    running = made.exec(0, "sh", "-c", f"exec {shlex.join(server.command)} >{tmp_path}/etcd.log 2>&1")
    yield made
    running.kill()
    running.communicate()
    made.close()


def three(start: Start, nodes: Nodes) -> list[Process]:
    """Members on nodes 1 and 2, a spare on node 3."""
    url = f"http://{nodes.address(0)}:2379"
    processes = []
    for number in (1, 2, 3):
        process = Process(f"n{number}", [url], start.job, 2, prepare=lambda number=number: nodes.enter(number),  # type: ignore[misc]
                          host=nodes.address(number), spare=number == 3, lease_ttl_s=2)  # fmt: skip
        start.processes.append(process)
        processes.append(process)
    watch(processes, reached(processes, "generation", 0))
    return processes


def test_a_node_that_is_cut_off_from_etcd_stops_before_another_goes_on_in_its_place(nodes: Nodes, start: Start) -> None:
    a, b, s = three(start, nodes)
    nodes.cut(2)
    a.tell("suspect", "n2")
    watch([a, b, s], lambda: b.of("expelled") and reached([a, s], "recovered", 1)())
    assert a.of("generation")[-1][3] == ["n1", "n3"]
    assert "is gone" in a.of("generation")[-1][4] and "nobody listens" not in a.of("generation")[-1][4]
    assert b.of("expelled")[0][0] <= a.of("generation")[-1][0] + 0.1, "it may have worked for longer than it was waited for"
    nodes.mend(2)
    b.tell("begin", 1)
    a.tell("begin", 2)
    watch([a, s], reached([a, s], "recovered", 2))
    assert b.number == 0 and a.of("generation")[-1][4] == "a fault"


def test_a_cable_that_is_pulled_for_a_moment(nodes: Nodes, start: Start) -> None:
    a, b, s = three(start, nodes)
    nodes.cut(2)
    a.tell("begin", 1)
    watch([a, s], reached([a, s], "generation", 1))
    time.sleep(0.5)  # this is the fault: its length
    nodes.mend(2)
    watch([a, b, s], reached([a, b, s], "recovered", 1))
    assert b.of("generation")[-1][3] == ["n1", "n2"]
