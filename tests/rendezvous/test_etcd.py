"""Ranks that know nothing of each other's hosts meet through a real etcd, and need it for that alone."""

from __future__ import annotations

import re
import time

import pytest

import lightning_gemini
from lightning_gemini.config import RendezvousConfig
from lightning_gemini.peers.errors import Unreachable
from lightning_gemini.rendezvous import etcd as roster_by_etcd
from lightning_gemini.rendezvous import initialize
from lightning_gemini.rendezvous.detect import Place
from tests.support.etcd import Etcd, require_etcd
from tests.support.meeting import free_port, summed, told

ELSEWHERE = {"MASTER_ADDR": "no-such-host.invalid"}
"""As under a launcher that spreads ranks over hosts and does not tell which."""


def test_ranks_meet_with_no_hosts_known(etcd: Etcd) -> None:
    def body(rank: int) -> str:
        lightning_gemini.init_process_group("gloo", etcd=etcd.url, timeout_s=20.0)
        node = initialize._Process.node
        assert node is not None and node.roster.local
        return f"{summed(rank)} {node.address == node.roster.addresses[rank][0]} {len(set(node.roster.addresses))}"

    assert told(body, 3, {**ELSEWHERE, "LIGHTNING_GEMINI_JOB": "meet"}) == ["7 True 3"] * 3
    leases = etcd.keys("/lightning_gemini/")
    assert sorted(leases) == [f"/lightning_gemini/meet/0/ranks/{rank}" for rank in range(3)]
    assert all(20 <= etcd.lives_s(lease) <= 20 + 120 for lease in leases.values()), "a job must leave nothing behind"


def test_without_etcd_they_do_not() -> None:
    def body(_: int) -> str:
        lightning_gemini.init_process_group("gloo", timeout_s=20.0)
        return "met"

    (answer,) = told(body, 3, ELSEWHERE, ranks=1)
    assert answer.startswith("ValueError: this launcher does not tell which hosts") and "rendezvous.etcd" in answer


def test_once_met_etcd_may_die(etcd: Etcd) -> None:
    """Everything after the first meeting goes between the ranks."""

    def body(rank: int) -> str:
        store, _, _ = initialize.meet(lightning_gemini.RendezvousConfig(etcd=etcd.url, timeout_s=20.0))
        store.set(f"met{rank}", "")
        store.get(f"met{1 - rank}")
        etcd.die()
        deadline = time.monotonic() + 10
        while etcd.answers():
            assert time.monotonic() < deadline
        store.set(f"{rank}", f"from {rank}")
        return str([store.get(f"{other}").decode() for other in range(2)])

    assert told(body, 2, ELSEWHERE) == ["['from 0', 'from 1']"] * 2


def test_a_rank_that_is_there_twice(etcd: Etcd) -> None:
    def body(_: int) -> str:
        lightning_gemini.init_process_group("gloo", rank=0, world_size=2, etcd=etcd.url, timeout_s=1.0)
        return "met"

    twice, waits = sorted(told(body, 2, {**ELSEWHERE, "LIGHTNING_GEMINI_JOB": "twice"}))
    assert twice.startswith("DuplicateRank: rank 0 of job 'twice' is in etcd already: give each process a rank")
    assert waits.startswith("Unreachable: 1 of 2 ranks did not appear")


def test_the_next_start_of_a_job_is_no_duplicate(etcd: Etcd) -> None:
    def body(rank: int) -> str:
        lightning_gemini.init_process_group("gloo", etcd=etcd.url, timeout_s=20.0)
        return str(summed(rank))

    for start in ("0", "1"):
        assert told(body, 2, {**ELSEWHERE, "LIGHTNING_GEMINI_JOB": "again", "LIGHTNING_GEMINI_START": start}) == ["3", "3"]
    assert len(etcd.keys("/lightning_gemini/again/")) == 4


def test_ranks_that_do_not_come_are_named_in_time(etcd: Etcd) -> None:
    def body(_: int) -> str:
        began = time.monotonic()
        with pytest.raises(Unreachable) as failure:
            lightning_gemini.init_process_group("gloo", etcd=etcd.url, timeout_s=1.0)
        return f"{time.monotonic() - began:.3f} {failure.value}"

    for answer in told(body, 5, ELSEWHERE, ranks=2):
        took, _, text = answer.partition(" ")
        assert text == "3 of 5 ranks did not appear in etcd within 1 s: [2, 3, 4]"
        assert 0.9 < float(took) < 4


@pytest.mark.parametrize("where", ["http://127.0.0.1:{port}", "http://no-such-host.invalid:{port}"])
def test_an_etcd_that_is_not_there_is_named(where: str) -> None:
    require_etcd()
    url = where.format(port=free_port())

    def body(_: int) -> str:
        lightning_gemini.init_process_group("gloo", etcd=url, timeout_s=2.0)
        return "met"

    (answer,) = told(body, 2, ELSEWHERE, ranks=1)
    assert re.match(rf"Unreachable: .*{re.escape(url.removeprefix('http://'))}", answer), answer
    assert "rendezvous.etcd" in answer


def test_without_a_token_nothing_is_told_beyond_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before etcd is asked anything: the address in the URL is one that nobody has."""
    monkeypatch.delenv("LIGHTNING_GEMINI_TOKEN", raising=False)
    monkeypatch.setattr(roster_by_etcd, "_own_address", lambda host, port: "192.0.2.7")
    place = Place(job="j", rank=0, world=2, hosts=(), generation=0)
    with pytest.raises(ValueError, match="LIGHTNING_GEMINI_TOKEN"):
        roster_by_etcd.listen_and_tell(RendezvousConfig(etcd="http://192.0.2.1:2379"), place, b"")
