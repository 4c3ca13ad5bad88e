"""How a job forms: who is in it and in which order, and what those hear who cannot be."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from lightning_gemini.membership.etcd import EtcdMembership
from lightning_gemini.membership.local import LocalMembership
from lightning_gemini.membership.records import Ending
from tests.membership.conftest import Start
from tests.membership.helpers import Agent, at, decide, have, pump, reached, watch
from tests.support.etcd import Etcd
from tests.support.meeting import free_port


def test_a_job_forms_in_the_same_order_for_all(start: Start, etcd: Etcd) -> None:
    agents = [start.agent(etcd, node, 4, preferred=preferred) for node, preferred in (("d", -1), ("c", 0), ("b", -1), ("a", 3))]
    pump(agents, at(agents, 0))
    assert [agent.generation.roster for agent in agents] == [["c", "b", "d", "a"]] * 4
    assert set(agents[0].nodes) == {"a", "b", "c", "d"}


def test_many_nodes_that_come_at_once(start: Start, etcd: Etcd) -> None:
    processes = [start.process(etcd, f"n{i:02}", 10, spare=i >= 10) for i in range(12)]
    watch(processes, reached(processes, "generation", 0), 40)
    assert {tuple(process.of("generation")[0][3]) for process in processes} == {tuple(f"n{i:02}" for i in range(10))}
    processes[0].tell("begin", 1)
    watch(processes, reached(processes[:10], "recovered", 1), 40)


def test_a_spare_does_not_form_the_job(start: Start, etcd: Etcd) -> None:
    a, s = start.agent(etcd, "a", 2), start.agent(etcd, "s", 2, spare=True)
    pump([a, s], have([a, s], "news"))
    assert s.of("news")[-1] == ("news", "1 of 2 nodes have registered")
    b = start.agent(etcd, "b", 2)
    pump([a, b, s], at([a, b, s], 0))
    assert s.generation.roster == ["a", "b"] and s.index == -1


def test_a_node_too_many_is_a_spare(start: Start, etcd: Etcd) -> None:
    a, b = start.agent(etcd, "a", 1), start.agent(etcd, "b", 1)
    pump([a, b], at([a, b], 0))
    a.membership.close()
    pump([b], at([b], 1))
    assert b.generation.roster == ["b"]


@pytest.mark.parametrize("field, value", [("ranks_per_node", 4), ("version", 9), ("script", "other")])
@pytest.mark.parametrize("formed", [True, False])
def test_a_node_that_does_not_fit_is_told_and_does_no_harm(start: Start, etcd: Etcd, field: str, value: Any, formed: bool) -> None:
    agents = [start.agent(etcd, "a", 2)]
    if formed:
        agents.append(start.agent(etcd, "b", 2))
        pump(agents, at(agents, 0))
    with pytest.raises(ValueError, match=rf"{field}=.* on node a \(127.0.0.1\) but {value!r} on node x"):
        start.agent(etcd, "x", 2, **{field: value})
    if not formed:
        agents.append(start.agent(etcd, "b", 2))
    pump(agents, at(agents, 0))
    assert agents[0].generation.roster == ["a", "b"]
    assert f"/lightning_gemini/{start.job}/nodes/x" not in etcd.keys("/")


def test_a_name_that_is_there_already(start: Start, etcd: Etcd) -> None:
    start.agent(etcd, "a/1", 2)
    with pytest.raises(ValueError, match="node='a/1' is in this job already"):
        start.agent(etcd, "a/1", 2)


def test_jobs_do_not_see_each_other(etcd: Etcd) -> None:
    """Not even if the name of one is the beginning of the other's."""
    agents = [Agent("a", lambda agent, job=job: EtcdMembership([etcd.url], job, 1, decide, agent)) for job in ("j", "j/nodes", "j2")]
    try:
        pump(agents, at(agents, 0))
        agents[0].membership.end(Ending(status=0, reason="done"))
        pump(agents, have(agents[:1], "ending"))
        agents[1].membership.begin(0, "a fault", step=1)
        pump(agents, have(agents[1:2], "recovered"))
        assert not agents[2].of("ending") and agents[2].generation.number == 0
    finally:
        for agent in agents:
            agent.membership.close()
    assert not etcd.keys("/lightning_gemini/") and not etcd.leases()


def test_nodes_that_do_not_come(start: Start, etcd: Etcd) -> None:
    a = start.agent(etcd, "a", 3, {"join_timeout_s": 1.0})
    b = start.agent(etcd, "b", 3, {"join_timeout_s": 1.0})
    pump([a, b], have([a, b], "ending"))
    for agent in (a, b):
        status, text = agent.of("ending")[0][1:]
        assert status == 1 and "2 of 3 nodes have registered after 1 s (membership.join_timeout_s); there: a (127.0.0.1), b (127" in text


def test_who_comes_too_late_hears_of_the_end(start: Start, etcd: Etcd) -> None:
    a = start.agent(etcd, "a", 1)
    pump([a], at([a], 0))
    a.membership.end(Ending(status=4, reason="too many faults"))
    pump([a], have([a], "ending"))
    late = start.agent(etcd, "late", 1)
    pump([late], have([late], "ending"))
    assert late.of("ending") == [("ending", 4, "too many faults")] and late.index == -1


@pytest.mark.parametrize("where", ["http://127.0.0.1:{port}", "http://no-such-host.invalid:{port}"])
def test_an_etcd_that_is_not_there(start: Start, where: str) -> None:
    url, began = where.format(port=free_port()), time.monotonic()
    with pytest.raises(ConnectionError, match=rf"membership.etcd={re.escape(url)}: no etcd answers \(.*\): is it there"):
        start.agent(url, "a", 1, {"connect_timeout_s": 0.5})
    assert time.monotonic() - began < 8


def test_an_etcd_that_starts_after_the_job(start: Start, etcd: Etcd) -> None:
    etcd.stop()
    process = start.process(etcd, "a", 1)
    etcd.restart()
    watch([process], reached([process], "generation", 0))


@pytest.mark.parametrize(
    "url, options, words",
    [
        ("127.0.0.1:2379", {}, "membership.etcd='127.0.0.1:2379' is not valid: give URLs"),
        ("", {}, "membership.etcd='' is not valid"),
        ("http://127.0.0.1", {"cert": "c.pem"}, "membership.cert='c.pem' is not valid with membership.key=None: give both"),
        ("http://127.0.0.1", {"lease_ttl_s": 0}, "membership.lease_ttl_s=0 is not valid: give a number above 0"),
    ],
)
def test_bad_input(url: str, options: dict[str, Any], words: str) -> None:
    agent = Agent("a", lambda agent: LocalMembership(decide, agent), join=False)
    with pytest.raises(ValueError, match=re.escape(words)):
        EtcdMembership([url], "job", 1, decide, agent, **options)
    agent.membership.close()
