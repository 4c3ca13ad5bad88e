"""Who may talk to a feeder, and what nonsense does to it."""

from __future__ import annotations

import os
import signal
import socket
import uuid

import msgspec
import pytest

from lightning_gemini.mapped import wire
from lightning_gemini.mapped.feed import Feed
from tests.mapped.helpers import Feeders, Samples, listener, of, reader, rest, words
from tests.support.forked import Ranks, Tell

NOBODY = 65534


def as_nobody() -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def connected(name: str) -> socket.socket:
    sock = wire.new_socket()
    sock.connect(wire.address(name))
    return sock


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")


@needs_root
def test_another_user_gets_nothing(feeders: Feeders) -> None:
    """Its connection is closed without a word; the feeder goes on."""
    name = feeders.feed(of(Samples()))
    address = wire.address(name)

    def stranger(_: int, tell: Tell) -> None:
        as_nobody()
        sock = wire.new_socket()
        sock.connect(address)
        try:
            sock.send(wire.encode(wire.Attach(member=0, number=0)))
            sock.send(wire.encode(wire.Bye(member=0)))
        except OSError:
            pass  # it was closed before
        tell(f"got {words(sock)!r}")
        signal.pause()

    ranks = Ranks(stranger, 1)
    try:
        assert ranks.hear(0) == "got b''"
        feed = reader(name)
        assert len(rest(feed)) == 10
        feed.close(bye=True)
    finally:
        ranks.end()


@needs_root
def test_a_listener_of_another_user_is_refused() -> None:
    """It has taken our name; root's own would be trusted."""
    name = uuid.uuid4().hex
    address = wire.address(name)

    def stranger(_: int, tell: Tell) -> None:
        as_nobody()
        sock = wire.new_socket()
        sock.bind(address)
        sock.listen(8)
        tell("listens")
        caller, _ = sock.accept()
        tell(f"got {words(caller)!r}")
        signal.pause()

    ranks = Ranks(stranger, 1)
    try:
        assert ranks.hear(0) == "listens"
        with pytest.raises(PermissionError, match=f"the loader process '{name}' belongs to another user"):
            Feed.connect(name, 0)
        assert ranks.hear(0) == "got b''"
    finally:
        ranks.end()


def test_nobody_is_there() -> None:
    assert Feed.connect(uuid.uuid4().hex, 0) is None


def test_two_cannot_have_one_name() -> None:
    name = uuid.uuid4().hex
    with listener(name), pytest.raises(OSError, match="in use"):
        listener(name)


NONSENSE = {
    "garbage": b"\xff\x00garbage",
    "empty": b"",
    "too long": b"x" * 20_000,
    "a long map": msgspec.msgpack.encode({"type": "want", "number": 0, "more": "x" * 20_000}),
    "not a struct": msgspec.msgpack.encode([1, 2]),
    "unknown": msgspec.msgpack.encode({"type": "destroy"}),
    "of the feeder": wire.encode(wire.End(number=0, size=0)),
    "incomplete": msgspec.msgpack.encode({"type": "attach", "member": 0}),
    "wrong type": msgspec.msgpack.encode({"type": "want", "number": "0"}),
    "huge": msgspec.msgpack.encode({"type": "want", "number": 2**64 - 1})[:-1],
    "two in one": wire.encode(wire.Want(number=0)) * 2,
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_nonsense_costs_that_connection_only(kind: str, feeders: Feeders) -> None:
    name = feeders.feed(of(Samples()))
    good = reader(name)
    rest(good, 2)
    sock = connected(name)
    sock.send(NONSENSE[kind])
    assert words(sock) == b""
    sock.close()
    attached = connected(name)
    attached.send(wire.encode(wire.Attach(member=0, number=2)))
    assert wire.decode_from_feeder(words(attached)) == wire.Attached(key=b"")
    attached.send(NONSENSE[kind])
    while words(attached):
        pass
    attached.close()
    assert len(rest(good)) == 8
    good.close(bye=True)


def test_descriptors_sent_to_it_are_not_kept(feeders: Feeders) -> None:
    name = feeders.feed(of(Samples()))
    good = reader(name)
    rest(good, 1)
    before = len(os.listdir(f"/proc/{feeders.newest}/fd"))
    for _ in range(20):
        sock = connected(name)
        socket.send_fds(sock, [b"garbage"], [0, 1, 2])
        assert words(sock) == b""
        sock.close()
    assert len(os.listdir(f"/proc/{feeders.newest}/fd")) <= before + 20
    good.close(bye=True)


def test_many_connections_that_say_nothing(feeders: Feeders) -> None:
    name = feeders.feed(of(Samples()))
    silent = [connected(name) for _ in range(60)]
    good = reader(name)
    assert len(rest(good)) == 10
    for sock in silent:
        sock.close()
    good.close(bye=True)
