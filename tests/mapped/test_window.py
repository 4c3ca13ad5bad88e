"""How many batches are kept, and for whom."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gemini.mapped.encoding import Encoded
from lightning_gemini.mapped.files import Held, Shelf
from lightning_gemini.mapped.window import Window

LIMIT_S = 20.0


def entry(size: int) -> Held:
    return Shelf(None).put(Encoded([b"b" * size], []))


def window(ranks: int = 1, *, first: int = 0, ahead: int = 3, behind: int = 2, limit: int = 1000) -> Window:
    return Window(first, ranks, ahead=ahead, behind=behind, limit=limit)


def kept(of: Window) -> list[int]:
    return [number for number in range(of.next) if of.batch(number) is not None]


def emptied(of: Window) -> None:
    """Give all files back."""
    for number in kept(of):
        of._drop(number)
    assert of.total == 0


class Call:
    """One call in a thread of its own."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.result: Any = None
        self._done = threading.Event()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=[call])
        self._thread.start()
        assert self._started.wait(LIMIT_S)

    def _run(self, call: Callable[[], Any]) -> None:
        self._started.set()
        self.result = call()
        self._done.set()

    @property
    def waits(self) -> bool:
        """After time enough to have returned."""
        return not self._done.wait(0.05)

    def get(self) -> Any:
        assert self._done.wait(LIMIT_S)
        self._thread.join()
        return self.result


def fill(of: Window, count: int, size: int = 10) -> None:
    for _ in range(count):
        assert of.wait_until_wanted() and of.wait_for_room(size)
        of.add(entry(size))


def test_ahead() -> None:
    """Three before anybody asks; then three from the batch that is waited for."""
    it = window()
    fill(it, 3)
    waiting = Call(it.wait_until_wanted)
    assert waiting.waits
    assert it.attach(0, 0)
    it.want(0, 0)
    assert waiting.waits
    it.want(0, 1)
    assert waiting.get() is True
    fill(it, 1)
    assert kept(it) == [0, 1, 2, 3]
    emptied(it)


@pytest.mark.parametrize(("behind", "left"), [(0, [5]), (2, [3, 4, 5]), (4, [1, 2, 3, 4, 5]), (9, [0, 1, 2, 3, 4, 5])])
def test_behind(behind: int, left: list[int]) -> None:
    it = window(behind=behind, ahead=10)
    it.attach(0, 0)
    fill(it, 6)
    it.want(0, 5)
    assert kept(it) == left
    emptied(it)


def test_attaching_again_goes_back() -> None:
    it = window(behind=2, ahead=4)
    it.attach(0, 0)
    fill(it, 4)
    it.want(0, 3)
    assert not it.attach(0, 0), "dropped"
    assert it.attach(0, 1) and it.attach(0, 4), "kept; and not made yet"
    assert it.attach(0, 2)
    fill(it, 2)
    waiting = Call(it.wait_until_wanted)
    assert waiting.waits, "the position is that of the replacement"
    it.end()
    assert waiting.get() is False
    emptied(it)


def test_the_first_may_be_any_number() -> None:
    it = window(first=7)
    assert not it.attach(0, 6)
    assert it.attach(0, 7)
    fill(it, 3)
    assert it.next == 10 and it.batch(7) is not None and it.batch(6) is None
    emptied(it)


def test_the_slowest_decides_what_is_kept_and_the_furthest_what_is_made() -> None:
    it = window(3, ahead=2, behind=1)
    it.attach(0, 0)
    it.attach(1, 0)
    fill(it, 2)
    it.want(0, 2)
    it.want(1, 2)
    assert kept(it) == [0, 1], "the third has not come yet"
    it.attach(2, 0)
    it.want(2, 1)
    fill(it, 2)
    it.want(0, 4)
    assert kept(it) == [0, 1, 2, 3]
    it.want(2, 3)
    assert kept(it) == [1, 2, 3], "rank 1 is last"
    it.want(1, 4)
    assert kept(it) == [2, 3], "rank 2 is"
    emptied(it)


def test_room_is_waited_for() -> None:
    """A batch ahead waits; the batch that is waited for drops those behind."""
    it = window(limit=30, ahead=9, behind=9)
    it.attach(0, 0)
    fill(it, 3)
    waiting = Call(lambda: it.wait_for_room(10))
    assert waiting.waits and kept(it) == [0, 1, 2]
    it.want(0, 2)
    assert waiting.waits and kept(it) == [0, 1, 2]
    it.want(0, 3)
    assert waiting.get() is True and kept(it) == [1, 2]
    it.add(entry(10))
    assert it.total == it.highest == 30
    emptied(it)


@pytest.mark.parametrize("size", [(1 << 20) + 1, 3 << 20, (3 << 20) + 1])
def test_a_batch_above_the_limit(size: int) -> None:
    it = window(limit=1 << 20)
    need = -(-size // (1 << 20))
    with pytest.raises(ValueError, match=rf"^mapped_data\.size_limit_mib=1 cannot hold one batch of {size} bytes: give {need} or more$"):
        it.wait_for_room(size)
    assert window(limit=need << 20).wait_for_room(size)


def test_a_rank_that_leaves_holds_nobody_back() -> None:
    """Neither one that has read, nor one that never came."""
    for attached in (True, False):
        it = window(2, limit=30, ahead=2, behind=0)
        it.attach(0, 0)
        if attached:
            it.attach(1, 0)
        fill(it, 2)
        it.leave(1)
        it.want(0, 2)
        fill(it, 2)
        assert kept(it) == [2, 3]
        assert it.attach(1, 2)
        it.want(0, 4)
        assert kept(it) == [2, 3], "it is back"
        emptied(it)


@pytest.mark.parametrize("call", ["wait_until_wanted", "wait_for_room"])
def test_the_end_wakes_the_producer(call: str) -> None:
    it = window(limit=30)
    fill(it, 3)
    waiting = Call(it.wait_until_wanted if call == "wait_until_wanted" else lambda: it.wait_for_room(10))
    assert waiting.waits
    it.end()
    assert waiting.get() is False
    assert it.wait_until_wanted() is False
    emptied(it)


steps = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 60), st.booleans()), max_size=40)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(0, 4), st.integers(60, 300), steps)
def test_its_limits_hold_whatever_happens(ranks: int, ahead: int, behind: int, limit: int, moves: list[tuple[int, int, bool]]) -> None:
    """A rank uses a batch that is there, or one is made if there is room."""
    it = window(ranks, ahead=ahead, behind=behind, limit=limit)
    at = dict.fromkeys(range(ranks), 0)
    for member in at:
        it.attach(member, 0)
    dropped_for_room: set[int] = set()
    for member, size, use in moves:
        member %= ranks
        if use:
            if at[member] < it.next:
                at[member] += 1
                it.want(member, at[member])
        elif it.next < max(at.values()) + ahead:
            before = set(kept(it))
            with it.lock:
                fits = it._fits(size)
            dropped_for_room |= before - set(kept(it))
            if fits:
                it.add(entry(size))
        assert it.total <= limit and it.highest <= limit
        assert it.total == sum(held.size for held in map(it.batch, kept(it)) if held is not None)
        assert it.next <= max(at.values()) + ahead
        must = set(range(max(0, min(at.values()) - behind), it.next)) - dropped_for_room
        assert set(kept(it)) == must
        assert all(number < min(at.values()) for number in dropped_for_room), "nothing that a rank still has to read"
    emptied(it)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 2), st.integers(1, 4), st.integers(0, 3), st.lists(st.integers(1, 60), min_size=1, max_size=30))
def test_threads_come_through(ranks: int, ahead: int, behind: int, sizes: list[int]) -> None:
    """A producer and readers that go at the pace they are given: everybody reads everything, within the limit of one or two batches."""
    it = window(ranks, ahead=ahead, behind=behind, limit=60 * ranks)
    made = threading.Condition()

    def produce() -> bool:
        for size in sizes:
            if not (it.wait_until_wanted() and it.wait_for_room(size)):
                return False
            it.add(entry(size))
            with made:
                made.notify_all()
        return True

    for member in range(ranks):
        it.attach(member, 0)
    producer = Call(produce)
    for number in range(len(sizes)):
        for member in range(ranks):
            it.want(member, number)
            with made:
                assert made.wait_for(lambda number=number: it.next > number, LIMIT_S)  # type: ignore[misc]
            assert it.batch(number) is not None
    assert producer.get() is True and it.highest <= it.limit
    emptied(it)
