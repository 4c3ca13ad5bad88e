"""The contract of a lane, over every implementation."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from lightning_gemini.replication.tcp import MAX_MESSAGE_BYTES, TcpLane
from lightning_gemini.replication.transport import Lane
from tests.replication.helpers import random_bytes

Pair = tuple[Lane, Lane]


def tcp(silence_s: float) -> Pair:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    return TcpLane(near, silence_s=silence_s), TcpLane(far, silence_s=silence_s)


IMPLEMENTATIONS: dict[str, Callable[[float], Pair]] = {"tcp": tcp}


@pytest.fixture(params=IMPLEMENTATIONS)
def connect(request: pytest.FixtureRequest) -> Iterator[Callable[[float], Pair]]:
    made: list[Lane] = []

    def make(silence_s: float = 20.0) -> Pair:
        pair = IMPLEMENTATIONS[request.param](silence_s)
        made.extend(pair)
        return pair

    yield make
    for lane in made:
        lane.close()


class Serving:
    """A lane that hears in a thread of its own, as one must that exposes memory for pulling."""

    def __init__(self, lane: Lane) -> None:
        self.heard: list[bytes] = []
        self.error: OSError | None = None
        self._lane = lane
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while True:
                self.heard.append(self._lane.hear())
        except OSError as error:
            self.error = error

    def end(self, other: Lane) -> None:
        other.shut()
        self._thread.join(10)


def test_messages_arrive_in_order(connect: Callable[..., Pair]) -> None:
    near, far = connect()
    messages = [b"", b"a", random_bytes(300_000, 1), b"z"]
    for message in messages:
        near.say(message)
    far.say(b"back")
    assert [far.hear(5) for _ in messages] == messages and near.hear(5) == b"back"


def test_a_push_lands_in_exposed_memory(connect: Callable[..., Pair]) -> None:
    near, far = connect()
    data, memory = random_bytes(1000, 1), bytearray(3000)
    key = far.expose(memoryview(memory), writable=True)
    near.push(key, 1500, memoryview(data)[:400], 7)
    near.push(key, 0, memoryview(data)[400:], 8)
    near.push(key, 3000, memoryview(b""), 9)
    assert [far.completion() for _ in range(3)] == [7, 8, 9]
    assert bytes(memory[1500:1900] + memory[:600]) == data


def test_a_message_ends_the_wait_for_a_completion(connect: Callable[..., Pair]) -> None:
    near, far = connect()
    memory = bytearray(10)
    key = far.expose(memoryview(memory), writable=True)
    near.push(key, 0, memoryview(b"abc"), 1)
    near.say(b"no more")
    assert (far.completion(), far.completion(), far.hear(5)) == (1, None, b"no more")


def test_pulls_are_served_while_the_other_end_hears(connect: Callable[..., Pair]) -> None:
    near, far = connect()
    data = random_bytes(1 << 20, 1)
    key = far.expose(memoryview(data), writable=False)
    far.say(b"%d" % key)
    serving = Serving(far)
    try:
        assert near.hear(5) == b"%d" % key
        into = [bytearray(1 << 18) for _ in range(4)]
        for number, part in enumerate(into):
            near.pull(key, number << 18, memoryview(part), number)
        assert sorted(number for _ in into if (number := near.completion()) is not None) == [0, 1, 2, 3]
        assert b"".join(into) == data
        near.say(b"thanks")
    finally:
        serving.end(near)
    assert serving.heard == [b"thanks"]


def test_a_pull_of_hidden_memory_completes_without_bytes(connect: Callable[..., Pair]) -> None:
    near, far = connect()
    key = far.expose(memoryview(b"secret"), writable=False)
    far.hide(key)
    serving, into = Serving(far), bytearray(6)
    try:
        near.pull(key, 0, memoryview(into), 1)
        assert near.completion() == 1 and into == bytes(6)
    finally:
        serving.end(near)


@pytest.mark.parametrize("start, size, writable", [(0, 11, True), (8, 3, True), (1 << 60, 1, True), (0, 1, False)])
def test_nobody_writes_beyond_what_he_was_given(connect: Callable[..., Pair], start: int, size: int, writable: bool) -> None:
    near, far = connect()
    memory = bytearray(10)
    key = far.expose(memoryview(memory), writable=writable)
    near.push(key, start, memoryview(b"x" * size), 1)
    with pytest.raises(OSError, match="that it was not given"):
        far.completion()
    assert memory == bytes(10)


def test_nobody_reads_beyond_what_he_was_given(connect: Callable[..., Pair]) -> None:
    near, far = connect()
    key = far.expose(memoryview(b"0123456789"), writable=False)
    near.pull(key, 8, memoryview(bytearray(3)), 1)
    with pytest.raises(OSError, match="that it was not given"):
        far.hear(5)


def test_a_message_that_is_too_long_is_not_taken(connect: Callable[..., Pair]) -> None:
    near, far = connect()
    failed: list[OSError] = []

    def say() -> None:
        try:
            near.say(bytes(MAX_MESSAGE_BYTES + 1))
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=say)
    thread.start()
    with pytest.raises(OSError, match="announced a message"):
        far.hear(5)
    far.shut()
    far.close()
    thread.join(10)
    assert failed


def test_silence_ends_a_wait(connect: Callable[..., Pair]) -> None:
    near, _ = connect(0.2)
    begun = time.monotonic()
    for wait in (near.completion, lambda: near.hear(0.2)):
        with pytest.raises(TimeoutError, match=r"has said nothing for 0\.2 s"):
            wait()
    assert time.monotonic() - begun < 5


def test_a_peer_that_takes_nothing_ends_a_push(connect: Callable[..., Pair]) -> None:
    near, far = connect(0.2)
    key = far.expose(memoryview(bytearray(1)), writable=True)
    data = memoryview(bytes(8 << 20))
    with pytest.raises(TimeoutError, match=r"has taken nothing for 0\.2 s"):
        for number in range(64):
            near.push(key, 0, data, number)


@pytest.mark.parametrize("which", [0, 1])
def test_shut_wakes_both_ends(connect: Callable[..., Pair], which: int) -> None:
    pair = connect()
    both = [Serving(lane) for lane in pair]
    pair[which].shut()
    for serving, lane in zip(both, pair, strict=True):
        serving.end(lane)
        assert serving.error is not None
