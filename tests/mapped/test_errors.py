"""What the user's code raises arrives as itself, with the sample, and never looks like the end of the data."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, Subset

from lightning_gemini.mapped.errors import carry, name_samples, note, reproduce
from tests.mapped.helpers import Feeders, Samples, of, reader, rest


class Broken(Exception):
    """An exception of the user's own."""


class Demanding(Exception):
    """Its constructor takes what `pickle` does not give it."""

    def __init__(self, place: str, why: int) -> None:
        super().__init__(f"{place} because of {why}")
        self.lock = threading.Lock()


class Breaks(Dataset[torch.Tensor]):
    """Raises in sample 5."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 5:
            raise self.error
        return torch.tensor([float(index)])


class Whole(Breaks):
    """Gives all samples of a batch at once."""

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        return [self[index] for index in indices]


class Ends(IterableDataset[torch.Tensor]):
    """Raises in its sixth sample."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __iter__(self) -> Iterator[torch.Tensor]:
        for value in range(20):
            if value == 5:
                raise self.error
            yield torch.tensor([float(value)])


class Slots(Samples):
    """Its class cannot be changed."""

    __slots__ = ("more",)


def failure(loader: Any, feeders: Feeders, before: int) -> BaseException:
    """What is raised after `before` batches; also by another reader that gets there."""
    name = feeders.feed(loader)
    feed = reader(name)
    assert len(rest(feed, before)) == before
    raised = []
    for one in (feed, reader(name, before)):
        with pytest.raises(BaseException) as caught:
            one.next()
        raised.append(caught.value)
    feed.close(bye=True)
    assert type(raised[0]) is type(raised[1]) and str(raised[0]) == str(raised[1])
    assert "in the loader process:\nTraceback" in notes(raised[0])
    return raised[0]


def notes(error: BaseException) -> str:
    return "\n".join(error.__notes__)


@pytest.mark.parametrize(
    "error", [Broken("bad file", 7), KeyError("k"), OSError(5, "I/O", "name"), SystemExit(3), MemoryError(), KeyboardInterrupt()], ids=repr
)
def test_it_arrives_as_itself(error: BaseException, feeders: Feeders) -> None:
    found = failure(of(Breaks(error)), feeders, 2)
    assert type(found) is type(error) and found.args == error.args
    if isinstance(error, Exception):
        assert "in sample 5 of Breaks" in notes(found)


def test_its_sample_is_named(feeders: Feeders) -> None:
    assert "in sample [4, 5] of Whole" in notes(failure(of(Whole(Broken())), feeders, 2))
    assert "in sample [4, 5] of Subset" in notes(failure(of(Subset(Breaks(Broken()), range(20))), feeders, 2))
    assert "in sample 5 (counted from 0) of this iterator over Ends" in notes(failure(of(Ends(Broken())), feeders, 2))


@pytest.mark.parametrize(("data", "before"), [(Breaks, 2), (Ends, 4)])
def test_from_a_worker(data: type, before: int, feeders: Feeders) -> None:
    """The loader makes it again from its text."""
    found = failure(of(data(Broken("bad file")), num_workers=2), feeders, before)
    assert type(found) is Broken
    assert "bad file" in str(found) and "in DataLoader worker process" in str(found)


@pytest.mark.parametrize("workers", [0, 2])
def test_stop_iteration_is_not_the_end(workers: int, feeders: Feeders) -> None:
    """The bare loader would leave out the rest of the epoch without a word."""
    found = failure(of(Breaks(StopIteration("early")), num_workers=workers), feeders, 2)
    assert type(found) is RuntimeError and "the data set raised StopIteration" in str(found)
    assert "StopIteration: early" in notes(found) + str(found)


def test_stop_iteration_in_a_generator_is_not_the_end(feeders: Feeders) -> None:
    assert type(failure(of(Ends(StopIteration())), feeders, 2)) is RuntimeError


@pytest.mark.parametrize("error", [Demanding("here", 3), type("Local", (Exception,), {})("here because of 3")], ids=["arguments", "local"])
def test_what_cannot_be_pickled_arrives_as_text(error: Exception, feeders: Feeders) -> None:
    found = failure(of(Breaks(error)), feeders, 2)
    assert type(found) is RuntimeError and str(found) == f"{type(error).__name__}: here because of 3"


def test_a_batch_that_cannot_be_pickled(feeders: Feeders) -> None:
    found = failure([1, 2, threading.Lock()], feeders, 2)
    assert type(found) is TypeError and "cannot be handed to another process: cannot pickle '_thread.lock' object" in str(found)


def collate(samples: list[torch.Tensor]) -> torch.Tensor:
    if any(int(sample[0]) == 4 for sample in samples):
        raise Broken("cannot be stacked")
    return torch.stack(samples)


@pytest.mark.parametrize("workers", [0, 2])
def test_from_the_collate_function(workers: int, feeders: Feeders) -> None:
    found = failure(of(Samples(), collate_fn=collate, num_workers=workers), feeders, 2)
    assert type(found) is Broken and "cannot be stacked" in str(found)


def test_in_the_first_batch(feeders: Feeders) -> None:
    assert type(failure(of(Breaks(Broken()), sampler=[5, 6]), feeders, 0)) is Broken
    assert type(failure(of(Samples(), sampler=iter_of_none()), feeders, 0)) is TypeError


def iter_of_none() -> Any:
    """A sampler whose indices are none."""
    return [None, None]


def test_data_sets_stay_what_they_are() -> None:
    for data in (Samples(4), Slots(4), Whole(Broken())):
        kind = type(data)
        loader = of(data)
        name_samples(loader)
        assert isinstance(data, kind) and type(data).__qualname__ == kind.__qualname__ and loader.dataset is data
        assert data[1].tolist() == loader.dataset[1].tolist()
    name_samples([1, 2])


def test_there_and_back() -> None:
    error = note(note(Broken("x"), "one"), "one")
    found = reproduce(carry(error))
    assert type(found) is Broken and found.__notes__[0] == "one" and len(found.__notes__) == 2
    assert isinstance(reproduce(carry(Demanding("a", 1))), RuntimeError)
