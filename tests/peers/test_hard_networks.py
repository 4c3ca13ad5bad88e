"""Late ranks, taken ports, claimants of the same rank, hosts that do not answer."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from lightning_gemini.peers import framing, wire
from lightning_gemini.peers.errors import DuplicateRank, Unreachable
from lightning_gemini.peers.node import PeerNode
from lightning_gemini.peers.roster import CANDIDATES, Roster
from tests.support.peers import Peers, Stranger, assert_works, at_once, new_job

Treat = Callable[[socket.socket], None]


def silent(caller: socket.socket) -> None:
    """Accept, and say nothing."""


def garbage(caller: socket.socket) -> None:
    caller.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def nothing_but_close(caller: socket.socket) -> None:
    caller.close()


@pytest.fixture
def occupy() -> Iterator[Callable[..., list[Stranger]]]:
    """Strangers at the first `count` candidates of rank 0."""
    strangers: list[Stranger] = []

    def take(roster: Roster, count: int, treat: Treat) -> list[Stranger]:
        for address in roster.addresses[0][:count]:
            strangers.append(Stranger(address, treat))
        return strangers

    yield take
    for stranger in strangers:
        stranger.close()


@pytest.mark.parametrize("tcp", [False, True])
def test_ranks_may_start_late(peers: Peers, tcp: bool) -> None:
    job = new_job()
    roster = Roster.on_hosts(job, ["127.0.0.1"], 3) if tcp else Roster.on_one_node(job, 3)
    waiting = threading.Event()

    def live(rank: int) -> list[bytes]:
        if rank == 2:
            assert waiting.wait(5)
            time.sleep(0.6)  # what is tested: the others have been refused several times by now
        node = peers.start(roster, rank)
        waiting.set()
        return node.all_gather(0, "g", rank, 3, b"%d" % rank)

    assert at_once([lambda rank=rank: live(rank) for rank in range(3)]) == [[b"0", b"1", b"2"]] * 3  # type: ignore[misc]


@pytest.mark.parametrize("tcp", [False, True])
def test_a_second_process_of_a_rank_is_refused_where_it_would_listen(peers: Peers, tcp: bool) -> None:
    nodes = peers.tcp(2) if tcp else peers.world(2)
    for node in nodes:
        with pytest.raises(DuplicateRank, match=f"rank {node.rank} of job '{node.roster.job}' is running already.*a rank of its own"):
            PeerNode(node.roster, node.rank, timeout_s=5)
    assert_works(nodes)


def test_a_second_process_of_a_rank_on_another_host_is_refused_by_its_peers(peers: Peers) -> None:
    """Two processes were both told to be rank 0; each listens at its own host."""
    job = new_job()
    right, wrong = (Roster.on_hosts(job, [host, "127.0.0.3"], 1) for host in ("127.0.0.1", "127.0.0.2"))
    first, second, other = peers.start(right, 0), peers.start(wrong, 0), peers.start(right, 1)
    assert_works([first, other])
    with pytest.raises(DuplicateRank, match="rank 0 of job .* is another process already"):
        second.all_gather(0, "again", 0, 2, b"")
    assert_works([first, other], "still")


@pytest.mark.parametrize("treat", [silent, garbage, nothing_but_close])
@pytest.mark.parametrize("taken", [1, CANDIDATES - 1])
def test_taken_ports_are_stepped_over(
    peers: Peers, occupy: Callable[..., list[Stranger]], treat: Treat, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(framing, "HANDSHAKE_S", 0.2)
    roster = Roster.on_hosts(new_job(), ["127.0.0.1"], 3)
    strangers = occupy(roster, taken, treat)
    nodes = [peers.start(roster, rank) for rank in range(3)]
    assert nodes[0].address == roster.addresses[0][taken]
    assert_works(nodes)
    assert all(stranger.calls for stranger in strangers), "nobody has asked the strangers: nothing was tested"


def test_all_ports_taken_is_an_error_that_names_them(occupy: Callable[..., list[Stranger]]) -> None:
    roster = Roster.on_hosts(new_job(), ["127.0.0.1"], 1)
    occupy(roster, CANDIDATES, nothing_but_close)
    with pytest.raises(Unreachable, match="rendezvous.port") as error:
        PeerNode(roster, 0, timeout_s=5)
    assert "rank 0" in str(error.value) and all(str(address) in str(error.value) for address in roster.addresses[0])


@pytest.mark.parametrize("tcp", [False, True])
def test_a_rank_that_does_not_come_is_named(peers: Peers, tcp: bool) -> None:
    job = new_job()
    roster = Roster.on_hosts(job, ["127.0.0.1"], 2) if tcp else Roster.on_one_node(job, 2)
    node = peers.start(roster, 0, timeout_s=0.8)
    began = time.monotonic()
    with pytest.raises(Unreachable, match=r"rank 0 could not reach rank 1 of job .* within 0\.8 s") as error:
        node.all_gather(0, "g", 0, 2, b"")
    assert time.monotonic() - began < 1.2
    assert all(str(address) in str(error.value) for address in roster.addresses[1])


def unanswering(address: tuple[str, int]) -> tuple[socket.socket, list[socket.socket]]:
    """A port where connections hang, as at a host behind a firewall: its queue is full and nobody accepts."""
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(address)
    server.listen(0)
    fillers = [socket.socket() for _ in range(3)]
    for filler in fillers:
        filler.setblocking(False)
        filler.connect_ex(address)
    return server, fillers


def test_a_host_that_does_not_answer_is_named_in_time(peers: Peers) -> None:
    roster = Roster.on_hosts(new_job(), ["127.0.0.1"], 2)
    holes = [unanswering((address.host, address.port)) for address in roster.addresses[1]]
    try:
        node = peers.start(roster, 0, timeout_s=1.0)
        began = time.monotonic()
        with pytest.raises(Unreachable, match=r"rank 0 could not reach rank 1 of job .* within 1 s") as error:
            node.all_gather(0, "g", 0, 2, b"")
        assert time.monotonic() - began < 1.5
        assert str(roster.addresses[1][0]) in str(error.value)
    finally:
        for server, fillers in holes:
            for sock in (server, *fillers):
                sock.close()


def test_a_name_that_does_not_resolve_is_named(peers: Peers) -> None:
    roster = Roster.on_hosts(new_job(), ["127.0.0.1", "no-such-host.invalid"], 1)
    node = peers.start(roster, 0, timeout_s=0.8, token=b"t")
    with pytest.raises(Unreachable, match=r"rank 1 .*no-such-host\.invalid:\d+"):
        node.call(0, wire.Put(next(key for key in map(str, range(99)) if node._now.keys.owner(key) == 1), b""))
    with pytest.raises(Unreachable, match=r"rank 1 .*no-such-host\.invalid:\d+.*rendezvous\.hosts"):
        PeerNode(roster, 1, timeout_s=5, token=b"t")


def test_two_jobs_with_the_same_port_live_side_by_side(peers: Peers) -> None:
    port = Roster.on_hosts(new_job(), ["h"], 2).addresses[0][0].port
    jobs = [Roster.on_hosts(new_job(), ["127.0.0.1"], 2, port=port) for _ in range(2)]
    worlds = [[peers.start(roster, rank) for rank in range(2)] for roster in jobs]
    for nodes in worlds:
        assert_works(nodes)
    assert len({str(node.address) for nodes in worlds for node in nodes}) == 4


def test_two_jobs_of_one_node_do_not_see_each_other(peers: Peers) -> None:
    worlds = [peers.world(3), peers.world(3)]
    for number, nodes in enumerate(worlds):
        nodes[0].call(0, wire.Put("k", b"%d" % number))
    assert [nodes[2].call(0, wire.Get("k"))[1] for nodes in worlds] == [b"0", b"1"]


@pytest.mark.parametrize("host", ["::1", "localhost"])
def test_other_spellings_of_this_host(peers: Peers, host: str) -> None:
    nodes = peers.tcp(3, host)
    assert_works(nodes)
    assert nodes[0].host in ("::1", "127.0.0.1")


@pytest.mark.parametrize("rank", [-1, 2, 99])
def test_a_rank_outside_the_roster_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank={rank} is not in the roster .* 2 ranks"):
        PeerNode(Roster.on_one_node(new_job(), 2), rank)


def test_other_hosts_need_a_token() -> None:
    with pytest.raises(ValueError, match="LIGHTNING_GEMINI_TOKEN"):
        PeerNode(Roster.on_hosts(new_job(), ["127.0.0.1", "192.0.2.1"], 1), 0)
