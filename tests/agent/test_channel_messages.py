"""The control connection: whole datagrams, end of file at a death, and nothing that does not decode gets in."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gemini.agent import messages as m
from lightning_gemini.agent.channel import Channel

FROM_RANK: list[m.FromRank] = [
    m.Hello(pid=7, config={"snapshot": {"every_n_steps": 1}, "faults": [], "replicated": True}, directory="/tmp/ü"),
    m.Waiting(),
    m.Fault(generation=2, step=3, where="forward", error="Traceback …\n", recoverable=False, at_ns=1 << 60),
    m.Stopped(generation=1, step=-1, wrote=True, in_step=False, unwinding=True, counters={"0": 4}),
    m.Progress(generation=1, phase="resumed", step=9),
    m.Left(),
]
FROM_AGENT: list[m.FromAgent] = [
    m.Assign(rank=1, generation=3),
    m.Recover(generation=1, reason="rank 1 died"),
    m.Plan(generation=1, target=5, rewind=False, replaced=[1], donors={1: 0}, logs={"0": (4, 0)}),
    m.Recovered(generation=1, reason="…", step=5, seconds={"detect": 0.1}, count=1),
    m.Stop(reason="the job has ended"),
]
GARBAGE = [b"", b"\x00", b"\xc1", b"hello", b"\x80", b"\x90", b"{}", b"\x81\xa4type\xa4left\x00", b"\x81\xa4type\xa6nobody", bytes(5000)]


@pytest.mark.parametrize("message", FROM_RANK, ids=lambda x: type(x).__name__)
def test_from_a_rank(message: m.FromRank) -> None:
    data = m.encode(message)
    assert m.decode_from_rank(data) == message
    with pytest.raises(msgspec.DecodeError):
        m.decode_from_agent(data)
    with pytest.raises(msgspec.DecodeError):
        m.decode_from_rank(data[:-1])


@pytest.mark.parametrize("message", FROM_AGENT, ids=lambda x: type(x).__name__)
def test_from_the_agent(message: m.FromAgent) -> None:
    data = m.encode(message)
    assert m.decode_from_agent(data) == message
    with pytest.raises(msgspec.DecodeError):
        m.decode_from_rank(data)


@pytest.mark.parametrize("data", GARBAGE, ids=lambda data: data[:12].hex() or "empty")
def test_garbage(data: bytes) -> None:
    for decode in (m.decode_from_rank, m.decode_from_agent):
        with pytest.raises(msgspec.DecodeError):
            decode(data)


def test_a_wrong_type_is_garbage() -> None:
    with pytest.raises(msgspec.DecodeError, match="Expected `int`, got `str`"):
        m.decode_from_rank(msgspec.msgpack.encode({"type": "progress", "generation": "1", "phase": "resumed"}))


def test_text_that_is_no_text_is_garbage() -> None:
    data = m.encode(m.Hello(pid=1, config={}, directory="/tmp")).replace(b"/tmp", b"/\xfft\xfe")
    with pytest.raises(msgspec.DecodeError):
        m.decode_from_rank(data)


def test_nesting_without_end_is_garbage() -> None:
    deep = msgspec.Raw(b"\x81\xa1a" + b"\x91" * 9000 + b"\x01")
    with pytest.raises(msgspec.DecodeError):
        m.decode_from_rank(msgspec.msgpack.encode({"type": "hello", "pid": 1, "directory": "", "config": deep}))


@given(message=st.sampled_from(FROM_RANK), flips=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4))
@settings(max_examples=400, deadline=None)
def test_damaged_messages_decode_or_raise_the_one_error(message: m.FromRank, flips: list[tuple[int, int]]) -> None:
    data = bytearray(m.encode(message))
    for position, value in flips:
        data[position % len(data)] = value
    with contextlib.suppress(msgspec.DecodeError):
        m.decode_from_rank(bytes(data))


# ---- the channel


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    ours, theirs = Channel.pair()
    other = Channel(theirs)
    yield ours, other
    ours.close()
    other.close()


def test_both_directions(ends: tuple[Channel, Channel]) -> None:
    a, b = ends
    for sender, receiver in ((a, b), (b, a)):
        for message in FROM_RANK:
            sender.send(m.encode(message))
        assert [m.decode_from_rank(receiver.receive(wait=True) or b"") for _ in FROM_RANK] == FROM_RANK


def test_nothing_there(ends: tuple[Channel, Channel]) -> None:
    with pytest.raises(BlockingIOError):
        ends[0].receive(wait=False)


def test_a_large_datagram_arrives_whole(ends: tuple[Channel, Channel]) -> None:
    data = os.urandom(150_000)
    ends[0].send(data)
    assert ends[1].receive(wait=True) == data


def test_threads_may_send_at_once(ends: tuple[Channel, Channel]) -> None:
    threads = [threading.Thread(target=lambda i=i: [ends[0].send(bytes([i]) * 500) for _ in range(50)]) for i in range(4)]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    found = [ends[1].receive(wait=True) or b"" for _ in range(200)]
    for thread in threads:
        thread.join()
    assert all(len(data) == 500 and len(set(data)) == 1 for data in found)


@pytest.mark.parametrize("how", ["close", "exit", "kill", "kill with unread messages"])
def test_the_end_of_the_peer_is_end_of_file(how: str) -> None:
    ours, theirs = Channel.pair()
    if how.endswith("unread messages"):
        ours.send(b"nobody reads this")
    pid = os.fork()
    if pid == 0:
        ours.close()
        peer = Channel(theirs)
        peer.send(b"last words")
        if how == "close":
            peer.close()
            signal.pause()
        if how.startswith("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(0)
    theirs.close()
    try:
        assert ours.receive(wait=True) in (b"last words", None)  # the kernel may drop what a resetting peer had sent
        assert ours.receive(wait=True) is None
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            ours.send(b"x")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        ours.close()
