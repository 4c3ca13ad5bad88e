"""Every rank computes the same addresses; bad input is named."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gemini.peers.roster import CANDIDATES, Address, Roster, derived_port, is_loopback

HOSTS = ["10.0.0.1", "10.0.0.2"]


def ports(roster: Roster, host: str) -> list[int]:
    return [address.port for candidates in roster.addresses for address in candidates if address.host == host]


def test_ranks_of_one_node_have_a_unix_socket_each() -> None:
    roster = Roster.on_one_node("a", 5)
    names = [address.host for candidates in roster.addresses for address in candidates]
    assert roster.size == len(set(names)) == 5
    assert all(address.is_unix for candidates in roster.addresses for address in candidates)
    assert all(len(name) < 100 for name in names), "a unix socket's name has 107 bytes at most"
    assert set(names).isdisjoint(address.host for candidates in Roster.on_one_node("b", 5).addresses for address in candidates)


def test_a_long_or_odd_job_name_does_not_reach_the_address() -> None:
    assert len(Roster.on_one_node("ü/" * 500, 1).addresses[0][0].host) < 100


@given(st.text(), st.integers(1, 64))
def test_candidates_of_a_host_are_disjoint_and_in_range(job: str, per_host: int) -> None:
    roster = Roster.on_hosts(job, HOSTS, per_host)
    assert roster.size == 2 * per_host
    for host in HOSTS:
        used = ports(roster, host)
        assert len(used) == len(set(used)) == CANDIDATES * per_host
        assert min(used) >= 16384 and max(used) < 32000, "outgoing connections take ports from 32768 up at random"
    assert [candidates[0].host for candidates in roster.addresses] == [HOSTS[0]] * per_host + [HOSTS[1]] * per_host


def test_ports_follow_from_the_job_name() -> None:
    jobs = [f"job-{number}" for number in range(300)]
    assert [Roster.on_hosts(job, HOSTS, 8) for job in jobs] == [Roster.on_hosts(job, HOSTS, 8) for job in jobs]
    assert len({derived_port(job, 32) for job in jobs}) > 280


def test_an_explicit_port_is_the_first_of_each_host() -> None:
    roster = Roster.on_hosts("a", HOSTS, 3, port=2000)
    assert ports(roster, HOSTS[0]) == ports(roster, HOSTS[1])
    assert sorted(ports(roster, HOSTS[0])) == list(range(2000, 2000 + 3 * CANDIDATES))
    assert [candidates[0].port for candidates in roster.addresses] == [2000, 2001, 2002] * 2


def test_the_last_ports_can_be_used() -> None:
    span = 2 * CANDIDATES
    assert max(ports(Roster.on_hosts("a", ["h"], 2, port=65536 - span), "h")) == 65535


@pytest.mark.parametrize("port", [0, -5, 65536 - 2 * CANDIDATES + 1, 99999])
def test_ports_that_do_not_fit_are_refused(port: int) -> None:
    with pytest.raises(ValueError, match=rf"rendezvous\.port={port} .*between 1024 and {65536 - 2 * CANDIDATES}"):
        Roster.on_hosts("a", ["h"], 2, port=port)


@pytest.mark.parametrize(
    ("hosts", "complaint"),
    [(["a", ""], "'' is empty"), (["a", " "], "'' is empty"), (["a", "b", "a"], "'a' is named twice")],
)
def test_bad_hosts_are_named(hosts: list[str], complaint: str) -> None:
    with pytest.raises(ValueError, match=r"rendezvous\.hosts=\[.*\] is not valid") as refusal:
        Roster.on_hosts("a", hosts, 1)
    assert str(hosts) in str(refusal.value) and complaint in str(refusal.value)


def test_one_host_in_two_spellings_is_found() -> None:
    with pytest.raises(ValueError, match="named twice"):
        Roster.on_hosts("a", ["::1", "[::1]"], 1)


@pytest.mark.parametrize("count", [0, -1])
def test_a_job_without_ranks_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"at least one rank, not {count}"):
        Roster.on_one_node("a", count)
    with pytest.raises(ValueError, match=f"at least one rank, not {count}"):
        Roster.on_hosts("a", ["h"], count)
    with pytest.raises(ValueError, match="at least one rank"):
        Roster.on_hosts("a", [], 1)


def test_ipv6_brackets_are_input_and_output_only() -> None:
    (candidates,) = Roster.on_hosts("a", ["[fe80::1]"], 1, port=2000).addresses
    assert candidates[0] == Address("fe80::1", 2000)
    assert str(candidates[0]) == "[fe80::1]:2000"
    assert str(Address("h", 5)) == "h:5"
    assert str(Address("name")) == "unix socket @name"


@pytest.mark.parametrize(
    ("hosts", "local"),
    [(["127.0.0.1"], True), (["127.0.0.1", "127.0.0.2"], True), (["::1"], True), (["localhost"], True), (["127.0.0.1", "10.0.0.1"], False)],
)
def test_local_means_that_no_address_leaves_the_machine(hosts: list[str], local: bool) -> None:
    assert Roster.on_hosts("a", hosts, 1).local is local
    assert Roster.on_one_node("a", 1).local


def test_names_are_not_taken_for_loopback() -> None:
    for host in itertools.chain(["0.0.0.0", "::", "node1", "localhost.example.org", "127.example.org"], HOSTS):
        assert not is_loopback(host)
