"""With a token only those who know it take part; a stranger costs one connection and one line in the log."""

from __future__ import annotations

import ast
import hashlib
import logging
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_gemini.peers import framing, wire
from lightning_gemini.peers.errors import Unreachable
from lightning_gemini.peers.node import PeerNode
from lightning_gemini.peers.roster import Roster
from tests.support.peers import Peers, Stranger, assert_works, connect, hello, new_job, receive, until

TOKEN, OTHER = b"the secret of this job", b"another secret"


@pytest.fixture
def nodes(peers: Peers) -> list[PeerNode]:
    return peers.tcp(3, token=TOKEN)


def challenged(node: PeerNode) -> tuple[socket.socket, bytes]:
    """A connection to a node, and the nonce it wants to see proved."""
    sock = connect(node.address)
    challenge = wire.from_listener.decode(receive(sock))
    assert isinstance(challenge, wire.Challenge)
    return sock, challenge.nonce


def say(sock: socket.socket, *messages: object) -> None:
    sock.sendall(b"".join(wire.frame(wire.encode(message)) for message in messages))


def ends(sock: socket.socket) -> list[object]:
    """What the node said before it closed the connection."""
    words: list[object] = []
    with sock:
        while body := receive(sock):
            words.append(wire.from_listener.decode(body))
    return words


def test_who_knows_the_token_takes_part(nodes: list[PeerNode]) -> None:
    assert_works(nodes)
    sock, challenge = challenged(nodes[0])
    with sock:
        words = hello(nodes[0], 2, challenge, TOKEN, process=nodes[2].process)
        say(sock, words, wire.Request(1, wire.Check("k")))
        welcome = wire.from_listener.decode(receive(sock))
        assert welcome == wire.Welcome(wire.welcome_mac(TOKEN, words, challenge))
        assert wire.reply.decode(receive(sock)).value is False


@pytest.mark.parametrize("unix", [False, True])
def test_who_has_another_token_is_refused_on_both_sides(peers: Peers, caplog: pytest.LogCaptureFixture, unix: bool) -> None:
    job = new_job()
    roster = Roster.on_one_node(job, 2) if unix else Roster.on_hosts(job, ["127.0.0.1"], 2)
    nodes = [peers.start(roster, rank, token=token, timeout_s=0.4) for rank, token in enumerate((TOKEN, OTHER))]
    for node in nodes:
        with pytest.raises(Unreachable, match="the job's token is another one") as error:
            node.all_gather(0, f"g{node.rank}", node.rank, 2, b"")
        assert not any(secret.decode() in f"{error.value!r} {node!r} {vars(error.value)}" for secret in (TOKEN, OTHER))
    assert [node.accepted for node in nodes] == [node.requests for node in nodes] == [0, 0]
    assert "could not prove that it knows the job's token" in caplog.text
    assert TOKEN.decode() not in caplog.text and OTHER.decode() not in caplog.text


@pytest.mark.parametrize("mine", [b"", TOKEN])
def test_a_peer_without_token_and_one_with_do_not_meet(peers: Peers, mine: bytes) -> None:
    roster = Roster.on_hosts(new_job(), ["127.0.0.1"], 2)
    nodes = [peers.start(roster, rank, token=token, timeout_s=0.4) for rank, token in enumerate((mine, TOKEN if not mine else b""))]
    with pytest.raises(Unreachable):
        nodes[0].all_gather(0, "g", 0, 2, b"")
    assert nodes[1].accepted == nodes[1].requests == 0


def test_an_impostor_is_not_believed(peers: Peers) -> None:
    """It listens where rank 1 should, claims to be welcome to all, and answers."""

    def pretend(caller: socket.socket) -> None:
        say(caller, wire.Challenge(wire.nonce()))
        receive(caller)
        say(caller, wire.Welcome(b"\0" * 32), wire.Reply(1, [1, b"a lie"]))

    roster = Roster.on_hosts(new_job(), ["127.0.0.1"], 2)
    impostor = Stranger(roster.addresses[1][0], pretend)
    try:
        node = peers.start(roster, 0, token=TOKEN, timeout_s=0.5)
        key = next(key for key in map(str, range(99)) if node._now.keys.owner(key) == 1)
        with pytest.raises(Unreachable, match="does not know the job's token"):
            node.call(0, wire.Get(key))
        assert impostor.calls
        right = peers.start(roster, 1, token=TOKEN)  # at its second candidate
        right.call(0, wire.Put(key, b"the truth"))
        assert node.call(0, wire.Get(key))[1] == b"the truth"
    finally:
        impostor.close()


def test_a_recorded_hello_is_worth_nothing(nodes: list[PeerNode]) -> None:
    sock, challenge = challenged(nodes[0])
    recorded = hello(nodes[0], 1, challenge, TOKEN)
    with sock:
        say(sock, recorded)
        assert isinstance(wire.from_listener.decode(receive(sock)), wire.Welcome)
    again, other = challenged(nodes[0])
    assert other != challenge
    say(again, recorded, wire.Request(1, wire.Put("k", b"replayed")))
    (refusal,) = ends(again)
    assert isinstance(refusal, wire.Refusal) and refusal.kind == "unproved"
    assert nodes[0].accepted == 1 and nodes[0].requests == 0


def test_a_proof_covers_all_that_is_said(nodes: list[PeerNode]) -> None:
    for change in ({"rank": 2}, {"generation": 9}, {"job": "other"}, {"process": b"x"}, {"to": 1}):
        sock, challenge = challenged(nodes[0])
        words = hello(nodes[0], 1, challenge, TOKEN)
        for name, value in change.items():
            setattr(words, name, value)
        say(sock, words)
        (refusal,) = ends(sock)
        assert isinstance(refusal, wire.Refusal) and refusal.kind == "unproved", change
    assert nodes[0].accepted == 0


def test_a_listener_tells_a_stranger_nothing_but_a_nonce(nodes: list[PeerNode]) -> None:
    with connect(nodes[0].address) as sock:
        body = receive(sock)
        assert nodes[0].roster.job.encode() not in body and len(body) < 50
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(1)


def wrong_hello(sock: socket.socket) -> None:
    say(sock, wire.Hello(job="j", generation=0, rank=1, to=0, process=b"p", nonce=b"n", mac=b"m" * 32))


RUDE: dict[str, tuple[Callable[[socket.socket], None], str]] = {
    "garbage": (lambda sock: sock.sendall(b"\0\0\0\x05hello"), "sent what is no message of ours"),
    "http": (lambda sock: sock.sendall(b"GET / HTTP/1.1\r\n\r\n"), "announced a frame of"),
    "4 GiB": (lambda sock: sock.sendall(b"\xff\xff\xff\xff" + b"x" * 1000), "announced a frame of 4294967295 bytes, 4096 are allowed"),
    "a frame too long for a stranger": (lambda sock: sock.sendall((4097).to_bytes(4, "big")), "announced a frame of 4097 bytes"),
    "deep": (lambda sock: sock.sendall(wire.frame(b"\x91" * 4000)), "sent what is no message of ours"),
    "a request": (lambda sock: say(sock, wire.Request(1, wire.Put("k", b"v"))), "sent what is no message of ours"),
    "a wrong proof": (wrong_hello, "could not prove that it knows the job's token"),
    "nothing": (lambda sock: None, "has not proved itself in time"),
    "half a frame": (lambda sock: sock.sendall(b"\0\0\1\0half"), "has not proved itself in time"),
}


@pytest.mark.parametrize("name", RUDE)
def test_a_stranger_costs_one_connection_and_one_line(
    nodes: list[PeerNode], name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(framing, "HANDSHAKE_S", 0.15)
    speak, complaint = RUDE[name]
    sock = connect(nodes[0].address)
    speak(sock)
    assert all(isinstance(words, (wire.Challenge, wire.Refusal)) for words in ends(sock))
    until(lambda: len(nodes[0]._listeners) == 0)
    lines = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(lines) == 1 and complaint in lines[0].getMessage() and "127.0.0.1" in lines[0].getMessage(), caplog.text
    assert nodes[0].accepted == nodes[0].requests == 0
    assert_works(nodes)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_peer_that_talks_nonsense_ends_its_own_connection_only(
    nodes: list[PeerNode], at_once: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Also when the nonsense comes along with the Hello, before the answer to it."""
    assert_works(nodes)
    sock, challenge = challenged(nodes[0])
    with sock:
        words = wire.frame(wire.encode(hello(nodes[0], 1, challenge, TOKEN, process=nodes[1].process)))
        nonsense = wire.frame(b"nonsense")
        sock.sendall(words + nonsense if at_once else words)
        assert isinstance(wire.from_listener.decode(receive(sock)), wire.Welcome)
        if not at_once:
            sock.sendall(nonsense)
        assert receive(sock) == b"", "the connection goes on"
    assert "sent what is no message of ours" in caplog.text
    assert_works(nodes, "still")


def test_two_hundred_idle_strangers_stop_nobody(nodes: list[PeerNode]) -> None:
    strangers = [connect(node.address) for node in nodes[:2] for _ in range(100)]
    try:
        until(lambda: len(nodes[0]._listeners) == len(nodes[1]._listeners) == 100)
        assert_works(nodes)
        nodes[0].call(0, wire.Put("k", b"v"))
        assert [node.call(0, wire.Get("k"))[1] for node in nodes] == [b"v"] * 3
    finally:
        for sock in strangers:
            sock.close()
    until(lambda: len(nodes[0]._listeners) < 10)


def test_the_peers_thread_never_enters_openssl() -> None:
    """A worker that is forked meanwhile would inherit OpenSSL's locks and hang: it happened once in three thousand forks."""
    allowed = {"hashlib": {"blake2b"}, "hmac": {"compare_digest"}}
    for path in Path(wire.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in allowed:
                assert node.attr in allowed[node.value.id], f"{path.name}: {node.value.id}.{node.attr}"
            assert not (isinstance(node, ast.ImportFrom) and node.module in {*allowed, "ssl"}), path.name
    assert hashlib.blake2b.__module__ == "_blake2"
