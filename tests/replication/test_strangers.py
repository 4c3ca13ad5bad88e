"""With a token only those who know it take part; a stranger costs one connection and one line."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from lightning_gemini.membership.records import VERSION
from lightning_gemini.peers import wire
from lightning_gemini.peers.errors import StaleGeneration, WrongPeer
from lightning_gemini.peers.roster import Address
from lightning_gemini.replication import door, messages
from lightning_gemini.replication.exchange import Exchange
from lightning_gemini.replication.fence import Peer
from tests.replication.helpers import CHUNK, LIMIT_S, TOKEN, Agent, Cluster, Seen, random_bytes
from tests.support.peers import Stranger, connect, receive

Speak = Callable[[socket.socket, Agent], None]


def knock(agent: Agent) -> tuple[socket.socket, bytes]:
    """A connection, and the nonce that is to be proved."""
    sock = socket.create_connection((agent.host, agent.exchange.port))
    sock.settimeout(LIMIT_S)
    challenge = wire.from_listener.decode(receive(sock))
    assert isinstance(challenge, wire.Challenge)
    return sock, challenge.nonce


def words(cluster: Cluster, challenge: bytes, token: bytes = TOKEN, **other: Any) -> messages.Hello:
    """The Hello of node 1 to node 0."""
    said = {"job": cluster.job, "generation": 0, "node": cluster.agents[1].node, "to": cluster.agents[0].node, "purpose": messages.PUSH}
    hello = messages.Hello(**{**said, "nonce": wire.nonce(), **other})
    hello.mac = messages.hello_mac(token, hello, challenge)
    return hello


def ends(sock: socket.socket) -> list[object]:
    """What was said before the connection ended."""
    said: list[object] = []
    with sock:
        while body := receive(sock):
            said.append(wire.from_listener.decode(body))
    return said


def assert_works(cluster: Cluster) -> None:
    sender = cluster.agents[1]
    payload = sender.arena(1).write(9, random_bytes(CHUNK, 9))
    sender.replicate(1, 9, 0)
    assert cluster.agents[0].replica(1, 9) == payload


def test_nothing_listens_beyond_loopback_without_a_token() -> None:
    with pytest.raises(ValueError, match="need a secret: set LIGHTNING_GEMINI_TOKEN"):
        Exchange(job="j", token=b"", node="n", host="0.0.0.0", observer=Seen())


def test_on_loopback_a_token_is_not_needed(cluster: Cluster) -> None:
    cluster.start(2, token=b"")
    assert_works(cluster)


def test_who_knows_the_token_is_welcome(cluster: Cluster) -> None:
    first, _ = cluster.start(2)
    sock, challenge = knock(first)
    with sock:
        hello = words(cluster, challenge)
        sock.sendall(messages.frame(hello))
        assert wire.from_listener.decode(receive(sock)) == wire.Welcome(messages.welcome_mac(TOKEN, hello, challenge))


def test_who_has_another_token_is_refused_on_both_sides(cluster: Cluster) -> None:
    first, second = cluster.add(), cluster.add(token=b"another secret")
    cluster.open(0, [first, second])
    for agent, index in ((first, 1), (second, 0)):
        with pytest.raises(WrongPeer, match="the job's token is another one"):
            agent.exchange.connect_control(index)
        agent.arena(index).write(1, b"x")
        agent.exchange.send(index, 1, [index])
    for agent in (first, second):
        agent.until(lambda agent=agent: any("could not prove" in text for text in agent.seen.news))  # type: ignore[misc]
        assert agent.exchange.replicas() == {} and not agent.seen.controls
        assert not any(secret in repr(vars(agent.seen)) for secret in (TOKEN.decode(), "another secret"))


CHANGES = [{"node": "x"}, {"generation": 9}, {"job": "other"}, {"to": "x"}, {"purpose": "pull"}, {"version": 2}, {"nonce": b"x"}]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_a_proof_covers_all_that_is_said(cluster: Cluster, change: dict[str, Any]) -> None:
    first, _ = cluster.start(2)
    sock, challenge = knock(first)
    hello = words(cluster, challenge)
    for name, value in change.items():
        setattr(hello, name, value)
    sock.sendall(messages.frame(hello))
    (refusal,) = ends(sock)
    assert isinstance(refusal, wire.Refusal) and refusal.kind == "unproved"


def test_a_recorded_proof_is_worth_nothing(cluster: Cluster) -> None:
    first, _ = cluster.start(2)
    sock, challenge = knock(first)
    recorded = words(cluster, challenge)
    sock.close()
    again, other = knock(first)
    assert other != challenge
    again.sendall(messages.frame(recorded))
    (refusal,) = ends(again)
    assert isinstance(refusal, wire.Refusal) and refusal.kind == "unproved"


def test_a_proof_between_ranks_does_not_serve_between_agents(cluster: Cluster) -> None:
    first, _ = cluster.start(2)
    sock, challenge = knock(first)
    hello = words(cluster, challenge)
    hello.mac = wire._mac(TOKEN, b"dialler" + challenge + messages.encode(hello))
    sock.sendall(messages.frame(hello))
    (refusal,) = ends(sock)
    assert isinstance(refusal, wire.Refusal) and refusal.kind == "unproved"


WRONG = {
    "job": ({"job": "another job"}, "wrong", "this is node"),
    "node": ({"to": "a node that was here before"}, "wrong", "this is node"),
    "version": ({"version": VERSION + 1}, "wrong", f"this is version {VERSION} of the protocol, not {VERSION + 1}: use one version"),
    "generation": ({"generation": -5}, "stale", "generation -5 is over, 0 has begun"),
}


@pytest.mark.parametrize("name", WRONG)
def test_who_belongs_elsewhere_is_told_so(cluster: Cluster, name: str) -> None:
    change, kind, text = WRONG[name]
    first, _ = cluster.start(2)
    sock, challenge = knock(first)
    sock.sendall(messages.frame(words(cluster, challenge, **change)))
    (refusal,) = ends(sock)
    assert isinstance(refusal, wire.Refusal) and refusal.kind == kind and text in refusal.text
    assert_works(cluster)


RUDE: dict[str, tuple[Speak, str]] = {
    "garbage": (lambda sock, agent: sock.sendall(b"\0\0\0\x05hello"), "sent what is no message of ours"),
    "http": (lambda sock, agent: sock.sendall(b"GET / HTTP/1.1\r\n\r\n"), "announced a frame of"),
    "4 GiB": (lambda sock, agent: sock.sendall(b"\xff\xff\xff\xff" + b"x" * 1000), "announced a frame of 4294967295 bytes, 4096 are"),
    "too long": (lambda sock, agent: sock.sendall((4097).to_bytes(4, "big")), "announced a frame of 4097 bytes"),
    "deep": (lambda sock, agent: sock.sendall(wire.frame(b"\x91" * 4000)), "sent what is no message of ours"),
    "an offer": (lambda sock, agent: sock.sendall(messages.frame(messages.Offer(0, 1, 0, 1, b"x"))), "sent what is no message of ours"),
    "nothing": (lambda sock, agent: None, "has not proved itself in time"),
    "half a frame": (lambda sock, agent: sock.sendall(b"\0\0\1\0half"), "has not proved itself in time"),
}


@pytest.mark.parametrize("name", RUDE)
def test_a_stranger_costs_one_connection_and_one_line(cluster: Cluster, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "HANDSHAKE_S", 0.15)
    first, _ = cluster.start(2)
    speak, complaint = RUDE[name]
    sock, _ = knock(first)
    speak(sock, first)
    assert ends(sock) == []
    first.until(lambda: first.seen.news)
    assert len(first.seen.news) == 1 and complaint in first.seen.news[0] and "127.0.0.1" in first.seen.news[0]
    assert not first.exchange._door._callers
    assert_works(cluster)


def test_an_impostor_is_not_believed(cluster: Cluster) -> None:
    """It listens where node 1 should, and welcomes everybody."""

    def pretend(caller: socket.socket) -> None:
        caller.sendall(messages.frame(wire.Challenge(wire.nonce())))
        receive(caller)
        caller.sendall(messages.frame(wire.Welcome(b"\0" * 64)))

    first, second = cluster.start(2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    impostor = Stranger(_address(port), pretend)
    try:
        first.exchange.open(1, {0: first.peer, 1: Peer(second.node, "127.0.0.1", port)}, 0)
        with pytest.raises(WrongPeer, match="does not know the job's token"):
            first.exchange.connect_control(1)
    finally:
        impostor.close()
    assert impostor.calls


def _address(port: int) -> Address:
    return Address("127.0.0.1", port)


@pytest.mark.parametrize("count", [200, door._MAX_STRANGERS + 50])
def test_a_crowd_of_strangers_stops_nobody(cluster: Cluster, count: int) -> None:
    first, _ = cluster.start(2)
    strangers = [connect(_address(first.exchange.port)) for _ in range(count)]
    try:
        first.until(lambda: len(first.exchange._door._callers) >= min(count, door._MAX_STRANGERS))
        assert_works(cluster)
        assert len(first.exchange._door._callers) <= door._MAX_STRANGERS
    finally:
        for sock in strangers:
            sock.close()
    first.until(lambda: not first.exchange._door._callers)


NONSENSE: dict[str, bytes] = {
    "no kind of ours": b"\xff" * 24,
    "a huge message": b"\x01\0\0\0" + b"\0" * 12 + b"\xff\xff\xff\xff" + b"\0" * 4,
    "a message that does not decode": b"\x01\0\0\0" + b"\0" * 12 + b"\x03\0\0\0" + b"\0" * 4 + b"abc",
    "bytes for memory that was not given": b"\x02\0\0\0\x07\0\0\0" + b"\0" * 8 + b"\x03\0\0\0" + b"\0" * 4 + b"abc",
    "an offer that contradicts itself": b"",
}


def _closed(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("name", NONSENSE)
@pytest.mark.parametrize("purpose", [messages.PUSH, messages.PULL])
def test_a_peer_that_talks_nonsense_ends_its_own_connection_only(cluster: Cluster, name: str, purpose: str) -> None:
    first, _ = cluster.start(2)
    sock, challenge = knock(first)
    with sock:
        sock.sendall(messages.frame(words(cluster, challenge, purpose=purpose)))
        assert isinstance(wire.from_listener.decode(receive(sock)), wire.Welcome)
        body = messages.encode(messages.Offer(0, 1, 0, 1 << 50, b"\0" * 24))
        sock.sendall(NONSENSE[name] or b"\x01\0\0\0" + b"\0" * 12 + len(body).to_bytes(4, "little") + b"\0" * 4 + body)
        if name == "an offer that contradicts itself" and purpose == messages.PUSH:
            assert b"contradicts itself" in sock.recv(4096)
        else:
            assert _closed(sock), "the connection goes on"
            first.until(lambda: first.seen.news)
    assert first.exchange.replicas() == {}
    assert_works(cluster)


def test_a_silent_listener_has_a_deadline(cluster: Cluster) -> None:
    first, second = cluster.start(2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        first.exchange.open(1, {0: first.peer, 1: Peer(second.node, "127.0.0.1", silent.getsockname()[1])}, 0)
        begun = time.monotonic()
        with pytest.raises(TimeoutError):
            first.exchange.connect_control(1, 0.2)
        assert time.monotonic() - begun < 5


def test_a_stale_dialler_is_told(cluster: Cluster) -> None:
    first, second = cluster.start(2)
    first.exchange.open(1, cluster.peers(), 0)
    with pytest.raises(StaleGeneration, match="generation 0 is over, 1 has begun"):
        second.exchange.connect_control(0)
