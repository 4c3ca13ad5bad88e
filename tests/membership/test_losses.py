"""Nodes that die, stop, are cut off or leave: who notices, how soon, and who takes their place. Agents are real processes."""

from __future__ import annotations

import re
import signal
import socket
import time

import pytest

from tests.membership.conftest import Start
from tests.membership.helpers import Process, at, have, pump, reached, watch
from tests.support.etcd import Etcd

SHORT = {"lease_ttl_s": 2}


def three(start: Start, etcd: Etcd, **options: object) -> list[Process]:
    """Members "a" and "b" and a spare "s", that have seen generation 0."""
    processes = [start.process(etcd, node, 2, spare=node == "s", **options) for node in "abs"]
    watch(processes, reached(processes, "generation", 0))
    return processes


def test_a_killed_node_is_noticed_by_its_lease(start: Start, etcd: Etcd) -> None:
    a, b, s = three(start, etcd)
    began = time.monotonic()
    b.signal(signal.SIGKILL)
    watch([a, s], reached([a, s], "recovered", 1))
    assert a.of("generation")[-1][2:] == s.of("generation")[-1][2:] == (1, ["a", "s"], "node b (127.0.0.1) at index 1 is gone")
    assert all(2.9 < process.of("generation")[-1][0] - began < 5 for process in (a, s))
    assert a.of("recovered")[0][3]["detect"] == 4, "as much as the leader can tell"


@pytest.mark.parametrize("leader", ["a", "b"])
def test_a_killed_node_that_is_suspected(start: Start, etcd: Etcd, leader: str) -> None:
    a, b, s = three(start, etcd)
    victim, other = (a, b) if leader == "a" else (b, a)
    began = time.monotonic()
    victim.signal(signal.SIGKILL)
    watch([victim], lambda: victim.of("died"))
    for process in (other, s):
        process.tell("suspect", victim.node)
    watch([other, s], reached([other, s], "recovered", 1))
    assert time.monotonic() - began < 1.5
    assert "nobody listens at its port" in s.of("generation")[-1][4] and other.number == 1, "it is lost once, whoever suspects it"
    assert set(s.of("generation")[-1][3]) == {other.node, "s"}


def test_a_suspect_that_lives_stays(start: Start, etcd: Etcd) -> None:
    a, b, s = three(start, etcd)
    a.tell("suspect", "b")
    a.tell("begin", 3)
    watch([a, b, s], reached([a, b, s], "recovered", 1))
    assert a.of("generation")[-1][3] == ["a", "b"]


def test_a_stopped_node_learns_that_it_was_expelled(start: Start, etcd: Etcd) -> None:
    a, b, s = three(start, etcd, **SHORT)
    b.signal(signal.SIGSTOP)
    a.tell("suspect", "b")
    watch([a, s], reached([a, s], "recovered", 1))
    b.tell("begin", 9)
    b.signal(signal.SIGCONT)
    watch([b], lambda: b.of("expelled"))
    assert re.search("lease could not be renewed for 2 s|its lease has ended|its registration in etcd is gone", b.of("expelled")[0][2])
    assert [event[1] for event in b.events].count("expelled") == 1 and b.number == 0
    b.tell("close")
    watch([b], lambda: b.of("died"))
    assert b.events[-2][1] == "expelled", "nothing follows"
    a.tell("begin", 3)
    watch([a, s], reached([a, s], "recovered", 2))
    assert a.of("generation")[-1][4] == "a fault", "what it wanted then does not happen now"


def test_a_node_that_was_stopped_for_a_moment_stays(start: Start, etcd: Etcd) -> None:
    a, b, s = three(start, etcd)
    b.signal(signal.SIGSTOP)
    a.tell("begin", 3)
    watch([a, s], reached([a, s], "generation", 1))
    b.signal(signal.SIGCONT)
    watch([a, b, s], reached([a, b, s], "recovered", 1))
    assert b.of("generation")[-1][3] == ["a", "b"]


def test_a_member_that_leaves_is_replaced_at_once(start: Start, etcd: Etcd) -> None:
    a, b, s = three(start, etcd)
    began = time.monotonic()
    a.tell("close")
    watch([b, s], reached([b, s], "recovered", 1))
    assert time.monotonic() - began < 1.5
    assert b.of("generation")[-1][2:] == (1, ["s", "b"], "node a (127.0.0.1) at index 0 has left")


def test_a_registration_that_was_removed(start: Start, etcd: Etcd) -> None:
    a, b = start.agent(etcd, "a", 2), start.agent(etcd, "b", 2)
    pump([a, b], at([a, b], 0))
    etcd.ask("lease/revoke", ID=str(etcd.keys(f"/lightning_gemini/{start.job}/nodes/b")[f"/lightning_gemini/{start.job}/nodes/b"]))
    pump([a, b], lambda: b.of("expelled") and a.generation.roster == ["a", ""])
    assert b.of("expelled")[0][1].startswith("node b is expelled: its registration in etcd is gone")


def test_a_vacant_place_is_filled_by_who_comes(start: Start, etcd: Etcd) -> None:
    a, b = start.agent(etcd, "a", 2), start.agent(etcd, "b", 2)
    pump([a, b], at([a, b], 0))
    b.membership.close()
    pump([a], at([a], 1))
    assert a.generation.roster == ["a", ""] and not a.of("plan")
    pump([a], have([a], "news"))
    assert a.of("news")[-1] == ("news", "generation 1 waits for a node in place of index 1")
    c = start.agent(etcd, "c", 2)
    pump([a, c], have([a, c], "recovered"))
    assert a.generation.number == 1 and a.generation.roster == ["a", "c"], "what a has reported still holds"
    assert [event[1] for event in a.of("plan")] == [1] and set(a.nodes) == {"a", "c"}


def test_nobody_comes_for_a_vacant_place(start: Start, etcd: Etcd) -> None:
    options = {"vacancy_timeout_s": 1.0}
    a, b = start.agent(etcd, "a", 2, options), start.agent(etcd, "b", 2, options)
    pump([a, b], at([a, b], 0))
    b.membership.close()
    pump([a], have([a], "ending"))
    status, text = a.of("ending")[0][1:]
    assert status == 1 and "generation 1 waits for a node in place of index 1 after 1 s (membership.vacancy_timeout_s)" in text
    assert "there: a (127.0.0.1)" in text


def test_all_nodes_of_a_job_are_replaced_one_after_the_other(start: Start, etcd: Etcd) -> None:
    processes = [start.process(etcd, str(number), 3, **SHORT) for number in range(3)]
    watch(processes, reached(processes, "generation", 0))
    for number in range(3, 6):
        processes.append(start.process(etcd, str(number), 3, **SHORT))
        watch(processes[-1:], lambda: processes[-1].of("joined"))
        dead = processes.pop(0)
        dead.signal(signal.SIGKILL)
        watch([dead], lambda dead=dead: dead.of("died"))
        processes[0].tell("suspect", dead.node)
        watch(processes, reached(processes, "recovered", number - 2))
    assert processes[0].of("generation")[-1][3] == ["3", "4", "5"]


def test_a_node_whose_part_is_done_is_no_loss(start: Start, etcd: Etcd) -> None:
    a, b = start.agent(etcd, "a", 2), start.agent(etcd, "b", 2)
    pump([a, b], at([a, b], 0))
    a.membership.finished()
    a.membership.close()
    b.membership.finished()
    pump([b], have([b], "ending"))
    assert b.of("ending") == [("ending", 0, "all nodes have finished")] and b.generation.number == 0


def test_a_listener_that_closes_its_connections_is_no_dead_agent(start: Start, etcd: Etcd) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        a, b = start.agent(etcd, "a", 2), start.agent(etcd, "b", 2, port=listening.getsockname()[1])
        pump([a, b], at([a, b], 0))
        a.membership.suspect("b")
        a.membership.begin(0, "a fault", step=1)
        pump([a, b], have([a, b], "recovered"))
        assert a.generation.roster == ["a", "b"]
    a.membership.suspect("b")
    pump([a, b], lambda: a.generation.roster == ["a", ""] and b.of("expelled"))
