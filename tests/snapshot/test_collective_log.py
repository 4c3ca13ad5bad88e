"""The log of collectives: what a replaced rank reads instead of communicating."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from lightning_gemini.snapshot.collective_log import CollectiveLog


@pytest.fixture
def fd() -> Iterator[int]:
    descriptor = os.memfd_create("test-log", os.MFD_CLOEXEC)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def log(fd: int) -> Iterator[CollectiveLog]:
    collectives = CollectiveLog(fd)
    collectives.allocate(64 * 1024)
    yield collectives
    collectives.close()


def read(fd: int) -> tuple[dict[tuple[str, int], bytes | None], dict[str, int]]:
    """What another process sees."""
    other = CollectiveLog(fd)
    try:
        return other.results(), other.counters()
    finally:
        other.close()


def test_a_log_that_was_never_allocated_is_empty(fd: int) -> None:
    assert read(fd) == ({}, {})


def test_a_new_log_is_empty(log: CollectiveLog) -> None:
    assert (log.results(), log.counters()) == ({}, {})


def test_results_and_counters(log: CollectiveLog, fd: int) -> None:
    log.rotate({})
    log.append("0", 0, b"first")
    log.append("0", 1, b"")
    log.append("mesh/dp", 0, b"other group")
    assert log.results() == {("0", 0): b"first", ("0", 1): b"", ("mesh/dp", 0): b"other group"}
    assert log.counters() == {"0": 2, "mesh/dp": 1}
    assert read(fd) == (log.results(), log.counters())


def test_counters_of_a_capture_count_without_results(log: CollectiveLog) -> None:
    log.rotate({"0": 40, "1": 7})
    log.append("0", 40, b"x")
    assert log.counters() == {"0": 41, "1": 7}
    assert set(log.results()) == {("0", 40)}


def test_three_captures_are_kept(log: CollectiveLog) -> None:
    for capture in range(6):
        log.rotate({"0": 2 * capture})
        log.append("0", 2 * capture, b"%d" % capture)
        log.append("0", 2 * capture + 1, b"%d" % capture)
    assert sorted(index for _, index in log.results()) == [6, 7, 8, 9, 10, 11]
    assert log.counters() == {"0": 12}


def test_entries_before_the_first_capture_are_kept(log: CollectiveLog) -> None:
    log.append("0", 0, b"set-up")
    log.rotate({"0": 1})
    assert log.results() == {("0", 0): b"set-up"}


def test_a_repeated_collective_replaces_its_older_result(log: CollectiveLog) -> None:
    log.rotate({})
    log.append("0", 0, b"old")
    log.rotate({})
    log.append("0", 0, b"new")
    assert log.results() == {("0", 0): b"new"}


def test_a_result_that_does_not_fit_is_missing_and_later_ones_are_kept(log: CollectiveLog) -> None:
    log.rotate({})
    log.append("0", 0, bytes(30_000))
    log.append("0", 1, bytes(40_000))
    log.append("0", 2, b"small")
    assert log.results() == {("0", 0): bytes(30_000), ("0", 1): None, ("0", 2): b"small"}
    assert log.counters() == {"0": 3}


def test_a_new_segment_has_room_again(log: CollectiveLog) -> None:
    log.rotate({})
    log.append("0", 0, bytes(70_000))
    log.rotate({"0": 1})
    log.append("0", 1, bytes(50_000))
    assert log.results() == {("0", 0): None, ("0", 1): bytes(50_000)}


def test_when_not_even_a_count_fits_it_says_what_to_raise(log: CollectiveLog) -> None:
    log.rotate({})
    with pytest.raises(MemoryError, match="snapshot.collective_log_mib"):
        for index in range(100_000):
            log.append("0", index, b"x")
    assert log.counters()["0"] == len(log.results()) > 1000


def test_allocating_again_empties_it(log: CollectiveLog) -> None:
    log.rotate({"0": 5})
    log.append("0", 5, b"x")
    log.allocate(8192)
    assert (log.results(), log.counters()) == ({}, {})


def test_a_successor_goes_on_in_the_same_log(log: CollectiveLog, fd: int) -> None:
    for capture in range(4):
        log.rotate({"0": capture})
        log.append("0", capture, b"%d" % capture)
    successor = CollectiveLog(fd)
    successor.append("0", 4, b"in the newest segment")
    successor.rotate({"0": 5})
    successor.append("0", 5, b"5")
    successor.close()
    assert sorted(log.results()) == [("0", 2), ("0", 3), ("0", 4), ("0", 5)]
    assert log.counters() == {"0": 6}


def test_a_killed_writer_leaves_only_whole_entries(fd: int) -> None:
    log = CollectiveLog(fd)
    log.allocate(1 << 20)
    for round_ in range(10):
        start = log.counters().get("0", 0)
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            mine = CollectiveLog(fd)
            for index in range(start, 1 << 30):
                if index % 50 == 0:
                    mine.rotate({"0": index})
                mine.append("0", index, index.to_bytes(8, "little") * 16)
                if index == start + 20 * round_:
                    os.write(writer, b"!")
            os._exit(1)
        os.close(writer)
        os.read(reader, 1)
        os.close(reader)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        results = log.results()
        assert log.counters()["0"] > start + 20 * round_
        assert results and all(data == index.to_bytes(8, "little") * 16 for (_, index), data in results.items())
        last = max(index for _, index in results)
        assert {index for _, index in results} == set(range(min(index for _, index in results), last + 1)), "a gap"
    log.close()
