"""The loader process is killed: another goes on where it was, and the batches are the same."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_gemini.mapped.feed import FeederLost
from tests.mapped.helpers import Feeders, Lines, Samples, is_gone, of, of_group, reader, rest, same, seed
from tests.support.forked import Ranks, Tell
from tests.support.peers import until

Make = Callable[[], Any]
LOADERS: dict[str, Make] = {
    "in order": lambda: of(Samples()),
    "shuffled": lambda: of(Samples(), shuffle=True),
    "shuffled and augmented": lambda: of(Samples(noise=True), shuffle=True),
    "shuffled, workers": lambda: of(Samples(), shuffle=True, num_workers=2),
    "shuffled stream": lambda: of(Lines(shuffled=True)),
    "stream, workers": lambda: of(Lines(), num_workers=2),
    "no batches, augmented": lambda: of(Samples(10, noise=True), batch_size=None, shuffle=True),
    "plain iterable": lambda: [torch.tensor([i]) for i in range(10)],
}


def test_a_rank_hears_of_it(feeders: Feeders) -> None:
    feed = reader(feeders.feed(of(Samples(400)), prefetch_length=2))
    rest(feed, 2)
    feeders.kill()
    with pytest.raises(FeederLost):
        rest(feed)
    with pytest.raises(FeederLost):
        feed.next()
    feed.close(bye=True)


def test_a_rank_that_waits_hears_of_it(feeders: Feeders) -> None:
    """While its batch is being made."""
    reader_end, writer_end = os.pipe()

    def slow() -> Any:
        yield 1
        os.read(reader_end, 1)  # for ever

    class Slow:
        def __iter__(self) -> Any:
            return slow()

    name = feeders.feed(Slow())

    def rank(_: int, tell: Tell) -> None:
        feed = reader(name)
        tell(str(feed.next()[0]))
        try:
            feed.next()
        except FeederLost:
            tell("lost")
        signal.pause()

    ranks = Ranks(rank, 1)
    try:
        assert ranks.hear(0) == "1"
        feeders.kill()
        assert ranks.hear(0) == "lost"
    finally:
        ranks.end()
        os.close(reader_end)
        os.close(writer_end)


def test_its_workers_leave_after_it(feeders: Feeders) -> None:
    feed = reader(feeders.feed(of(Samples(400), num_workers=2)))
    rest(feed, 1)
    assert len(of_group(feeders.newest)) == 3
    feeders.kill()
    until(lambda: not of_group(feeders.newest))
    feed.close(bye=False)


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_another_goes_on(make: Make, feeders: Feeders) -> None:
    """It is killed before the first batch of an epoch, after one, and several times in its middle."""
    seed()
    expected = list(feeders.mapped(make()))
    for kills in ([0], [1], [3, 4, 7]):
        seed()
        loader = feeders.mapped(make(), prefetch_length=1)
        batches, found = iter(loader), []
        known = len(feeders.started)
        for number in range(len(expected)):
            found.append(next(batches))
            if number in kills:
                feeders.kill()
        assert next(batches, None) is None
        same(found, expected)
        assert len(feeders.started) == known + 1 + len(kills)
        loader.close()


def test_epochs_after_a_loss_are_the_same(feeders: Feeders) -> None:
    def epochs(loader: Any, kill: int) -> list[Any]:
        found = []
        for _ in range(3):
            for number, batch in enumerate(loader):
                found.append(batch)
                torch.rand(2)
                if number == kill:
                    feeders.kill()
        return found

    seed()
    expected = epochs(feeders.mapped(of(Samples(), shuffle=True)), -1)
    generators = torch.get_rng_state()
    seed()
    same(epochs(feeders.mapped(of(Samples(), shuffle=True)), 4), expected)
    assert torch.equal(torch.get_rng_state(), generators)


def test_skipped_samples_are_not_read_again(feeders: Feeders) -> None:
    data = Samples()
    loader = feeders.mapped(of(data, shuffle=True), prefetch_length=1)
    batches = iter(loader)
    for _ in range(6):
        next(batches)
    before = data.reads.total
    feeders.kill()
    assert len(list(batches)) == 4
    assert data.reads.total - before == 8


class Deadly(Samples):
    """Its process is killed at sample 4, as often as it is read."""

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_three_losses_in_a_row(feeders: Feeders, caplog: pytest.LogCaptureFixture) -> None:
    batches = iter(feeders.mapped(of(Deadly()), prefetch_length=1))
    assert [int(next(batches)[0, 0]) for _ in range(2)] == [0, 2]
    with pytest.raises(RuntimeError, match="^the loader process was lost 3 times before batch 2 was there: "):
        next(batches)
    assert len(feeders.started) == 3
    assert caplog.text.count("rank 0 lost its loader process before batch 2: another is started") == 2


def test_losses_with_a_batch_in_between_are_no_row(feeders: Feeders) -> None:
    batches = iter(feeders.mapped(of(Samples())))
    for _ in range(8):
        next(batches)
        feeders.kill()
    assert len(list(batches)) == 2


def test_two_ranks_lose_one(feeders: Feeders) -> None:
    """The first to notice starts another, the other attaches to that."""
    user, name = of(Samples(), shuffle=True), f"two-{os.urandom(8).hex()}"
    seed()
    expected = list(feeders.mapped(user))
    found, ranks = [], []
    for member in range(2):  # each with the generators that it would have in a process of its own
        seed()
        loader = feeders.mapped(user, name=name, member=member, ranks=2, prefetch_length=1)
        loader._index = 0
        ranks.append(iter(loader))
        found.append([next(ranks[member])])
    first, second = ranks
    assert len(feeders.started) == 2
    feeders.kill()
    for _ in range(9):
        found[0].append(next(first))
        found[1].append(next(second))
    same(found[0], expected)
    same(found[1], expected)
    assert len(feeders.started) == 3


def test_a_rank_behind_what_is_kept_makes_its_own(feeders: Feeders) -> None:
    """It does not take part in the shared one then."""
    user, name = of(Samples()), f"behind-{os.urandom(8).hex()}"
    loader = feeders.mapped(user, name=name, lookback_length=0, prefetch_length=1)
    batches = iter(loader)
    positions = []
    for _ in range(6):
        next(batches)
        positions.append(loader.position())
    again = feeders.mapped(user, name=name, lookback_length=0, prefetch_length=1)
    again.begin_at(positions[2])
    assert [int(batch[0, 0]) for batch in again] == [4, 6, 8, 10, 12, 14, 16, 18]
    assert len(feeders.started) == 2
    feeders.kill(next(iter(feeders.started)))
    assert is_gone(next(iter(feeders.started.values())))
