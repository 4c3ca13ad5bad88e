"""What happens to etcd happens to the job only if it lasts longer than a lease, or takes the job's keys with it."""

from __future__ import annotations

import ast
import signal
import threading
import time
from pathlib import Path

import pytest

import lightning_gemini.membership
from lightning_gemini.membership.records import Ending
from tests.membership.conftest import QUICK, Start
from tests.membership.helpers import Agent, Process, at, have, pump, reached, watch
from tests.support.campaign import more
from tests.support.etcd import Certificates, Cluster, Etcd, require_etcd
from tests.support.meeting import free_port


def two(start: Start, etcd: Etcd, **options: object) -> list[Agent]:
    """Members of generation 0."""
    agents = [start.agent(etcd, node, 2, dict(options)) for node in "ab"]
    pump(agents, at(agents, 0))
    return agents


def recover(agents: list[Agent]) -> None:
    """Once more."""
    number = agents[0].generation.number
    agents[0].membership.begin(number, "a fault", step=number)
    pump(agents, lambda: all(any(event[1] == number + 1 for event in agent.of("recovered")) for agent in agents))


def test_nothing_is_left_of_a_job_that_has_finished(start: Start, etcd: Etcd) -> None:
    threads = threading.active_count()
    agents = [*two(start, etcd), start.agent(etcd, "s", 2, spare=True)]
    recover(agents)
    for agent in agents:
        agent.membership.finished()
    pump(agents, have(agents, "ending"))
    assert etcd.keys("/")
    for agent in agents:
        agent.membership.close()
    assert not etcd.keys("/") and not etcd.leases() and threading.active_count() == threads


def test_nothing_stays_for_ever_of_a_job_that_was_killed(start: Start, etcd: Etcd) -> None:
    processes = [start.process(etcd, node, 2) for node in "ab"]
    watch(processes, reached(processes, "generation", 0))
    processes[0].tell("begin", 1)
    watch(processes, reached(processes, "recovered", 1))
    for process in processes:
        process.signal(signal.SIGKILL)
    leases = etcd.keys("/")
    assert all(lease and etcd.lives_s(lease) <= 60 for lease in leases.values()), leases


def test_a_job_of_the_same_name_after_one_that_was_killed(start: Start, etcd: Etcd) -> None:
    """It goes on with new nodes: what they report shows that nothing is left of the old ones."""
    old = [start.process(etcd, node, 2, lease_ttl_s=2) for node in "ab"]
    watch(old, reached(old, "generation", 0))
    for process in old:
        process.signal(signal.SIGKILL)
    new = [start.agent(etcd, node, 2) for node in "cd"]
    pump(new, have(new, "recovered"))
    assert sorted(new[0].generation.roster) == ["c", "d"]


def test_what_is_wished_just_before_leaving_still_happens(start: Start, etcd: Etcd) -> None:
    a, b = two(start, etcd)
    a.membership.end(Ending(status=5, reason="last words"))
    a.membership.close()
    pump([b], have([b], "ending"))
    assert b.of("ending") == [("ending", 5, "last words")]


def test_an_etcd_that_is_away_for_less_than_a_lease_costs_nothing(start: Start, etcd: Etcd) -> None:
    agents = two(start, etcd)
    etcd.stop()
    agents[0].membership.begin(0, "a fault", step=1)
    stays = time.monotonic() + 2
    pump(agents, lambda: time.monotonic() > stays)
    etcd.restart()
    pump(agents, have(agents, "recovered"))
    recover(agents)
    assert not any(agent.of("expelled") for agent in agents)


def test_an_etcd_that_is_silent_for_less_than_a_lease_costs_nothing(start: Start, etcd: Etcd) -> None:
    agents = two(start, etcd)
    etcd.pause()
    agents[0].membership.begin(0, "a fault", step=1)
    stays = time.monotonic() + 2
    pump(agents, lambda: time.monotonic() > stays)
    etcd.resume()
    pump(agents, have(agents, "recovered"))
    recover(agents)
    assert not any(agent.of("expelled") for agent in agents)


@pytest.mark.parametrize("how", ["die", *more("pause")])
def test_an_etcd_that_is_away_for_longer(start: Start, etcd: Etcd, how: str) -> None:
    agents = two(start, etcd, lease_ttl_s=2)
    began = time.monotonic()
    getattr(etcd, how)()
    pump(agents, have(agents, "expelled"))
    assert 1 < time.monotonic() - began < 3.5
    assert "its lease could not be renewed for 2 s, so that others may have taken its place (http" in agents[0].of("expelled")[0][1]
    began = time.monotonic()
    for agent in agents:
        agent.membership.begin(0, "late", step=1)
        agent.membership.close()
    assert time.monotonic() - began < 12


def test_a_job_stays_when_all_its_nodes_were_expelled(start: Start, etcd: Etcd) -> None:
    """Also where etcd is back by the time that they withdraw: they may all come again."""
    agents = two(start, etcd, lease_ttl_s=2)
    etcd.die()
    pump(agents, have(agents, "expelled"))
    etcd.restart()
    for agent in agents:
        agent.membership.close()
    again = [start.agent(etcd, node, 2, spare=True, again=True, host=f"127.0.0.{i}") for i, node in enumerate(("a2", "b2"), 2)]
    pump(again, have(again, "recovered"))


def test_an_etcd_that_was_wiped(start: Start, etcd: Etcd) -> None:
    agents = two(start, etcd)
    for _ in range(3):
        recover(agents)
    etcd.restart(wiped=True)
    pump(agents, have(agents, "expelled"))
    for agent in agents:
        assert agent.of("expelled")[0][1] == (
            f"node {agent.node} is expelled: etcd has lost the keys of this job: it was wiped or restored, or they were deleted"
        )
    assert not etcd.keys("/"), "no new job begins"


def test_keys_that_were_deleted(start: Start, etcd: Etcd) -> None:
    agents = two(start, etcd)
    etcd.ask("kv/deleterange", key="AA==", range_end="AA==")
    pump(agents, have(agents, "expelled"))
    assert "etcd has lost the keys of this job" in agents[0].of("expelled")[0][1]


def test_changes_that_were_compacted_away(start: Start, etcd: Etcd) -> None:
    a, b = start.process(etcd, "a", 2), start.process(etcd, "b", 2)
    watch([a, b], reached([a, b], "generation", 0))
    b.signal(signal.SIGSTOP)
    for number in (1, 2):
        a.tell("begin", number)
        watch([a], reached([a], "generation", number))
    etcd.ask("kv/compaction", revision=etcd.ask("kv/range", key="AA==")["header"]["revision"])
    b.signal(signal.SIGCONT)
    watch([a, b], reached([a, b], "recovered", 2))


def test_tls(start: Start, tmp_path: Path) -> None:
    require_etcd()
    files = Certificates.make(tmp_path / "certificates")
    server = Etcd(tmp_path / "etcd", certificates=files, flags=QUICK)
    try:
        agents = two(start, server, ca=files.ca, cert=files.cert, key=files.key)
        recover(agents)
        for wrong in ({}, {"ca": files.ca}):
            with pytest.raises(ConnectionError, match=r"no etcd answers \(https://.*(certificate|EOF|eof).*and certificates right"):
                start.agent(server, "x", 2, {"connect_timeout_s": 0.1, **wrong})
        start.end()
        assert not server.keys("/")
    finally:
        start.end()
        server.stop()


@pytest.mark.campaign
def test_a_user_whose_token_expires(start: Start, tmp_path: Path) -> None:
    require_etcd()
    server = Etcd(tmp_path / "etcd", flags=(*QUICK, "--auth-token-ttl", "1"))
    server.protect("gemini", "secret", "/lightning_gemini/")
    try:
        agents = two(start, server, user="gemini", password="secret")
        for _ in range(3):
            recover(agents)
            stays = time.monotonic() + 2.5
            pump(agents, lambda stays=stays: time.monotonic() > stays)  # type: ignore[misc]
        recover(agents)
        assert not any("refuses" in event[1] for agent in agents for event in agent.of("news"))
        for wrong in ({}, {"user": "gemini", "password": "guess"}):
            with pytest.raises(ValueError, match=r"membership.etcd=http.* etcd refuses \(etcdserver: .*\): check that membership.user"):
                start.agent(server, "x", 2, wrong)
    finally:
        start.end()
        server.stop()


def test_a_proxy_for_the_web_is_not_asked(start: Start, etcd: Etcd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    two(start, etcd)


def members_of(start: Start, cluster: Cluster) -> list[Process]:
    processes = [start.process(cluster, node, 3) for node in "abc"]
    watch(processes, reached(processes, "generation", 0))
    return processes


@pytest.mark.parametrize("how", ["die", *more("pause")])
def test_the_loss_of_one_etcd_of_three_costs_nothing(start: Start, cluster: Cluster, how: str) -> None:
    processes = members_of(start, cluster)
    processes[0].tell("begin", 1)
    watch(processes, reached(processes, "recovered", 1))
    victim = cluster.leader()
    getattr(victim, how)()
    for number in (2, 3):
        processes[number - 1].tell("begin", number)
        watch(processes, reached(processes, "recovered", number))
    stays = time.monotonic() + 5
    with pytest.raises(AssertionError):
        watch(processes, lambda: any(process.of("expelled") for process in processes), stays - time.monotonic())
    processes[0].tell("begin", 4)
    watch(processes, reached(processes, "recovered", 4))
    assert processes[0].of("generation")[-1][3] == ["a", "b", "c"]
    victim.resume()


def test_wall_clocks_may_be_days_apart_and_jump(start: Start, etcd: Etcd) -> None:
    def skewed(days: int) -> None:
        real, calls = time.time, [0]

        def wrong() -> float:
            calls[0] += 1
            return real() + days * 86400 - calls[0] * 1000  # and it runs backwards

        time.time = wrong

    processes = [start.process(etcd, node, 2, spare=node == "s", prepare=lambda days=days: skewed(days)) for days, node in enumerate("abs")]
    watch(processes, reached(processes, "generation", 0))
    processes[1].signal(signal.SIGKILL)
    watch(processes[::2], reached(processes[::2], "recovered", 1))
    assert 0 < sum(processes[0].of("recovered")[0][3].values()) < 10


def test_nothing_reads_a_wall_clock() -> None:
    folder = Path(lightning_gemini.membership.__file__).parent
    sources = {path.name: ast.parse(path.read_text()) for path in folder.glob("*.py")}
    assert len(sources) > 10
    for name, tree in sources.items():
        words = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        words |= {alias.name for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
        assert not words & {"time_ns", "datetime", "now", "utcnow", "gmtime", "localtime"}, name
        calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert "time.time" not in calls and "time" not in calls, name
