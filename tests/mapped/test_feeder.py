"""A feeder gives the batches that the bare loader gives, keeps those that its settings say, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler

from lightning_gemini.mapped.feed import BatchGone, Feed
from tests.mapped.helpers import LIMIT_S, Feeders, Lines, Samples, is_gone, of, of_group, reader, rest, same, seed, task_of
from tests.support.forked import Ranks, Tell
from tests.support.peers import until

Make = Callable[[], Any]
LOADERS: dict[str, Make] = {
    "in order": lambda: of(Samples()),
    "shuffled": lambda: of(Samples(), shuffle=True),
    "shuffled, workers": lambda: of(Samples(), shuffle=True, num_workers=2),
    "augmented": lambda: of(Samples(noise=True), shuffle=True),
    "augmented, workers": lambda: of(Samples(noise=True), shuffle=True, num_workers=2),
    "persistent workers": lambda: of(Samples(), num_workers=2, persistent_workers=True),
    "distributed": lambda: of(Samples(), sampler=DistributedSampler(Samples(), 2, 1, seed=9)),
    "distributed, workers": lambda: of(Samples(), sampler=DistributedSampler(Samples(), 2, 0, seed=9), num_workers=2),
    "batch sampler": lambda: of(Samples(), batch_size=1, batch_sampler=BatchSampler(RandomSampler(Samples()), 3, True)),
    "no batches": lambda: of(Samples(), batch_size=None),
    "iterable": lambda: of(Lines(shuffled=True)),
    "iterable, workers": lambda: of(Lines(shuffled=True), num_workers=2),
    "plain iterable": lambda: [torch.tensor([i]) for i in range(15)],
    "empty": lambda: [],
}


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_the_same_batches_in_order(make: Make, feeders: Feeders) -> None:
    seed()
    expected = list(make())
    seed()
    feed = reader(feeders.feed(make(), prefetch_length=3))
    same(rest(feed), expected)
    feed.close(bye=True)


def test_batches_of_any_structure(feeders: Feeders) -> None:
    batches = [{"x": torch.ones(2, 3), "y": ["a", None, b"b"]}, (1, [2.5, {"z": torch.tensor(True)}]), None, "text", 7]
    feed = reader(feeders.feed(batches))
    found = rest(feed)
    assert torch.equal(found[0].pop("x"), torch.ones(2, 3)) and found[0] == {"y": ["a", None, b"b"]}
    assert found[1][1][1]["z"].item() is True and found[2:] == batches[2:]
    feed.close(bye=True)


# ---- its settings


@pytest.mark.parametrize("length", [1, 3, 7])
def test_prefetch_length(length: int, feeders: Feeders) -> None:
    """That many batches are made before the first is used, and one more for each that is."""
    data = Samples(40)
    feed = reader(feeders.feed(of(data), prefetch_length=length))
    for used in range(4):
        rest(feed, 1)
        until(lambda used=used: data.reads.total >= 2 * (length + used))  # type: ignore[misc]
        until(lambda: is_idle(feeders.newest))
        assert data.reads.total == 2 * (length + used)
    feed.close(bye=True)


def is_idle(pid: int) -> bool:
    """All threads sleep, and nothing has happened meanwhile."""
    before = psutil.Process(pid).cpu_times()
    states = [Path(f"/proc/{pid}/task/{task}/stat").read_text().rpartition(")")[2].split()[0] for task in os.listdir(f"/proc/{pid}/task")]
    return set(states) == {"S"} and psutil.Process(pid).cpu_times() == before


@pytest.mark.parametrize("length", [0, 2, 5])
def test_lookback_length(length: int, feeders: Feeders) -> None:
    """A batch that far behind the one that is asked for is there; the one before it is not, and is said to be gone."""
    data = Samples(40)
    name = feeders.feed(of(data), lookback_length=length, prefetch_length=1)
    rest(reader(name), 9)  # the last of them is made when those before it have been used
    again = reader(name, 8 - length)
    assert [int(batch[0, 0]) for batch in rest(again, length + 1)] == [2 * n for n in range(8 - length, 9)]
    assert data.reads.most() == 1
    rest(again, 1)
    late = reader(name, 8 - length)
    with pytest.raises(BatchGone, match=f"batch {8 - length} is no longer kept"):
        late.next()
    late.close(bye=False)
    again.close(bye=True)


@pytest.mark.parametrize("encryption", [False, True])
def test_directory_and_encryption(encryption: bool, tmp_path: Path, feeders: Feeders) -> None:
    """Files without a name lie in the directory, in plain or not."""
    data = Samples(8, width=1000)
    feed = reader(feeders.feed(of(data), directory=str(tmp_path), encryption=encryption))
    found = rest(feed, 2)
    assert [int(batch[0, 0]) for batch in found] == [0, 2]
    until(lambda: data.reads.total == 8)
    until(lambda: len(lying_in(feeders.newest, tmp_path)) == 4)
    assert os.listdir(tmp_path) == []
    plain = torch.full((100,), 6.0).numpy().tobytes()
    contents = [Path(path).read_bytes() for path in lying_in(feeders.newest, tmp_path)]
    assert any(plain in content for content in contents) is not encryption
    same(found + rest(feed), list(of(Samples(8, width=1000))))
    feed.close(bye=True)


def lying_in(pid: int, directory: Path) -> list[str]:
    """A process's open files in a directory."""
    paths = [f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")]
    return [path for path in paths if os.path.lexists(path) and os.readlink(path).startswith(str(directory))]


def test_size_limit(feeders: Feeders) -> None:
    """1 MiB holds three batches of 300 KiB, whatever the two lengths say; everything still arrives."""
    data = Samples(20, width=150 << 8)
    feed = reader(feeders.feed(of(data), size_limit_mib=1, prefetch_length=9, lookback_length=9))
    found = rest(feed, 1)
    until(lambda: data.reads.total >= 8)  # three kept, and one in the making
    assert feeders_size(feeders.newest) < (1 << 20)
    found += rest(feed)
    assert data.reads.total == 20 and len(found) == 10
    feed.close(bye=True)


def feeders_size(pid: int) -> int:
    """Bytes of the files that a feeder holds."""
    paths = [f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")]
    return sum(os.stat(path).st_size for path in paths if "memfd:gemini-batch" in os.readlink(path))


def test_a_batch_above_the_size_limit(feeders: Feeders) -> None:
    feed = reader(feeders.feed(of(Samples(4, width=1 << 18)), size_limit_mib=1))
    with pytest.raises(ValueError, match=r"mapped_data\.size_limit_mib=1 cannot hold one batch of \d+ bytes: give 3 or more"):
        feed.next()
    feed.close(bye=True)


def test_shared_by_two_processes(feeders: Feeders) -> None:
    """Both get all, each sample is read once, and the first to leave does not end it."""
    data = Samples(40)
    name = feeders.feed(of(data), ranks=2, prefetch_length=2)

    def rank(number: int, tell: Tell) -> None:
        feed = reader(name, member=number)
        tell(str([int(batch[0, 0]) for batch in rest(feed)]))
        feed.close(bye=True)
        tell("left")

    ranks = Ranks(rank, 2)
    try:
        for number in range(2):
            assert ranks.hear(number) == str(list(range(0, 40, 2)))
            assert ranks.hear(number) == "left"
    finally:
        ranks.end()
    assert data.reads.total == 40 and data.reads.most() == 1


# ---- attaching


def test_attached_in_the_middle(feeders: Feeders) -> None:
    name = feeders.feed(of(Samples(20)), lookback_length=9)
    rest(reader(name), 6)
    feed = reader(name, 4)
    assert [int(batch[0, 0]) for batch in rest(feed)] == [8, 10, 12, 14, 16, 18]
    feed.close(bye=True)


def test_the_replacement_of_a_killed_rank_gets_the_same_batch(feeders: Feeders) -> None:
    """Also when it is killed several times; no sample is read again."""
    data = Samples(40, noise=True)
    seed()
    expected = list(of(data, shuffle=True))
    before = data.reads.total
    seed()
    name = feeders.feed(of(data, shuffle=True), prefetch_length=4)
    number = 0
    for used in (1, 3, 4):

        def rank(_: int, tell: Tell, number: int = number, used: int = used) -> None:
            tell(str(torch.stack(rest(reader(name, number), used)).tolist()))
            signal.pause()

        ranks = Ranks(rank, 1)
        try:
            assert ranks.hear(0) == str(torch.stack(expected[number : number + used]).tolist())
        finally:
            ranks.end()
        number += used - 1
    feed = reader(name, number)
    same(rest(feed), expected[number:])
    assert data.reads.total == before + 40
    feed.close(bye=True)


def test_a_rank_may_go_back_and_forth(feeders: Feeders) -> None:
    """Within what is kept."""
    name = feeders.feed(of(Samples(8), batch_size=1), lookback_length=256)
    for number in [7, 0, 3, 2, 6, 0, 7]:
        feed = reader(name, number)
        assert [int(batch[0, 0]) for batch in rest(feed, 2)] == [number, number + 1][: 8 - number]
        feed.close(bye=False)
    reader(name).close(bye=True)


# ---- its end


@pytest.mark.parametrize("workers", [0, 2])
def test_it_ends_with_its_last_rank(workers: int, feeders: Feeders) -> None:
    name = feeders.feed(of(Samples(), num_workers=workers), ranks=2)
    first, second = reader(name), reader(name, member=1)
    rest(first), rest(second, 3)
    first.close(bye=True)
    assert len(rest(second, 2)) == 2
    second.close(bye=True)
    assert is_gone(pid_of(feeders))
    until(lambda: not of_group(feeders.newest))
    assert Feed.connect(name, 0) is None


def test_a_rank_that_left_may_come_back(feeders: Feeders) -> None:
    name = feeders.feed(of(Samples()), ranks=2)
    for _ in range(3):
        feed = reader(name)
        rest(feed, 1)
        feed.close(bye=True)
    assert not is_gone(pid_of(feeders), 0)
    last = reader(name)
    reader(name, member=1).close(bye=True)
    assert len(rest(last)) == 10
    last.close(bye=True)


def test_it_ends_with_unread_batches_on_the_way(feeders: Feeders) -> None:
    for i in range(50):
        feed = reader(feeders.feed(of(Samples(30))))
        rest(feed, i % 3)
        feed.close(bye=True)
        assert is_gone(pid_of(feeders), 5.0), f"time {i}"


@pytest.mark.parametrize("workers", [0, 2])
def test_it_ends_with_its_owner(workers: int, feeders: Feeders) -> None:
    """SIGKILL of the owner takes the workers too, while a rank still reads."""
    name = "owned-" + os.urandom(8).hex()

    def own(_: int, tell: Tell) -> None:
        tell(str(feeders.start(name, task_of(of(Samples(400), num_workers=workers)))))
        signal.pause()

    owner = Ranks(own, 1)
    try:
        pid = int(owner.hear(0))
        feeders.add(pid)
        feed = reader(name)
        rest(feed, 2)
        assert len(of_group(pid)) == 1 + workers
    finally:
        owner.end()
    assert is_gone(pid_of(feeders))
    until(lambda: not of_group(pid))
    feed.close(bye=False)


def pid_of(feeders: Feeders) -> int:
    """The newest one's descriptor."""
    return feeders.started[feeders.newest]


def test_ctrl_c_is_not_its_business(feeders: Feeders) -> None:
    """SIGINT to the whole process group of the rank that has started it."""
    name = "interrupted-" + os.urandom(8).hex()

    def rank(_: int, tell: Tell) -> None:
        os.setpgid(0, 0)
        tell(str(feeders.start(name, task_of(of(Samples(400), num_workers=1)), os.getppid())))
        try:
            signal.pause()
        except KeyboardInterrupt:
            tell("interrupted")
        signal.pause()

    ranks = Ranks(rank, 1)
    try:
        pid = int(ranks.hear(0))
        feeders.add(pid)
        feed = reader(name)
        rest(feed, 1)
        os.killpg(ranks.pids[0], signal.SIGINT)
        assert ranks.hear(0) == "interrupted"
        os.kill(pid, signal.SIGINT)
        for worker in psutil.Process(pid).children():
            worker.send_signal(signal.SIGINT)
        assert len(rest(feed, 20)) == 20
    finally:
        ranks.end()
    feed.close(bye=True)
    assert is_gone(pid_of(feeders), LIMIT_S)


def test_nothing_is_left(feeders: Feeders) -> None:
    """Not in the process that has started and read ten of them."""
    before, shared = descriptors(), set(os.listdir("/dev/shm"))
    for workers in [0, 2] * 5:
        feed = reader(feeders.feed(DataLoader(Samples(), batch_size=2, num_workers=workers)))
        assert len(rest(feed)) == 10
        feed.close(bye=True)
        assert is_gone(pid_of(feeders))
    pidfds = {str(fd) for fd in feeders.started.values()}
    assert descriptors() <= before | pidfds
    assert not {name for name in set(os.listdir("/dev/shm")) - shared if str(feeders.newest) in name}


def descriptors() -> set[str]:
    return {fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")}
