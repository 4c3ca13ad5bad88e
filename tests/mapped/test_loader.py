"""The loader that stands in the Trainer gives what the bare one gives, from wherever it begins."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DistributedSampler, RandomSampler, WeightedRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader  # type: ignore[import-untyped]

from lightning_gemini.data.position import PositionedLoader
from lightning_gemini.mapped import checkpoint
from tests.mapped.helpers import Feeders, Lines, Samples, draw, epoch, of, same, seed, state, train

Make = Callable[[], Any]
EPOCHS = 2


def weighted() -> WeightedRandomSampler:
    return WeightedRandomSampler([float(i + 1) for i in range(20)], 14, replacement=True)


LOADERS: dict[str, Make] = {
    "in order": lambda: of(Samples(), batch_size=4),
    "shuffled": lambda: of(Samples(), batch_size=4, shuffle=True),
    "shuffled, workers": lambda: of(Samples(), batch_size=4, shuffle=True, num_workers=2),
    "weighted": lambda: of(Samples(), batch_size=4, sampler=weighted()),
    "weighted, workers": lambda: of(Samples(), batch_size=4, sampler=weighted(), num_workers=2),
    "with replacement": lambda: of(Samples(), batch_size=4, sampler=RandomSampler(Samples(), replacement=True, num_samples=14)),
    "batch sampler": lambda: of(Samples(), batch_size=1, batch_sampler=BatchSampler(RandomSampler(Samples()), 6, True)),
    "distributed": lambda: of(Samples(), batch_size=4, sampler=DistributedSampler(Samples(), 2, 1, seed=9)),
    "distributed, workers": lambda: of(Samples(), batch_size=4, sampler=DistributedSampler(Samples(), 2, 0, seed=9), num_workers=2),
    "no batches": lambda: of(Samples(6), batch_size=None, shuffle=True),
    "no batches, workers": lambda: of(Samples(6), batch_size=None, shuffle=True, num_workers=2),
    "iterable": lambda: of(Lines(), batch_size=4),
    "iterable, workers": lambda: of(Lines(shuffled=True), batch_size=4, num_workers=2),
    "plain iterable": lambda: [torch.tensor([i]) for i in range(5)],
}
MIXED: dict[str, Make] = {
    "augmented": lambda: of(Samples(noise=True), batch_size=4, shuffle=True),
    "shuffled stream": lambda: of(Lines(shuffled=True), batch_size=4),
    "no batches, augmented": lambda: of(Samples(6, noise=True), batch_size=None, shuffle=True),
}
"""Their data draws from the global generators between batches, so they are compared with themselves."""
STATEFUL: dict[str, Make] = {
    "torchdata": lambda: StatefulDataLoader(Samples(), batch_size=4, shuffle=True),
    "torchdata, workers": lambda: StatefulDataLoader(Samples(), batch_size=4, shuffle=True, num_workers=2),
    "torchdata, iterable": lambda: StatefulDataLoader(Lines(), batch_size=4, num_workers=2),
}
ALL = LOADERS | MIXED | STATEFUL
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_epochs_are_those_of_the_bare_loader(make: Make, feeders: Feeders) -> None:
    """Batches, and what training draws between and after them."""
    seed()
    expected, generators = train(make(), 3), state()
    seed()
    loader = feeders.mapped(make())
    same(train(loader, 3), expected)
    assert state() == generators
    assert len(feeders.started) == 3


@pytest.mark.parametrize("make", MIXED.values(), ids=MIXED)
def test_the_first_batch_is_that_of_the_bare_loader(make: Make, feeders: Feeders) -> None:
    seed()
    expected = next(iter(make()))
    generators = state()
    seed()
    loader = feeders.mapped(make())
    assert torch.equal(next(iter(loader)), expected)
    assert state() == generators


def recorded(loader: Any, record: Callable[[], Any]) -> tuple[list[Any], list[tuple[int, Any, bytes]]]:
    """All batches of two epochs; and after each its epoch, a record as it is stored, and the generators after its step."""
    batches, records = [], []
    for number in range(EPOCHS):
        for batch in epoch(loader, number):
            batches.append(batch)
            records.append((number, pickle.dumps(record()), state()))
    return batches, records


def go_on(loader: Any, number: int) -> list[Any]:
    """The rest of an epoch and those after it."""
    return [batch for following in range(number, EPOCHS) for batch in epoch(loader, following)]


def bounds(batches: list[Any], workers: bool) -> list[int]:
    """The first and the last batches of both epochs, and one in between; fewer where each costs two more processes."""
    half = len(batches) // EPOCHS
    return sorted({1, half - 1, half} if workers else {0, 1, half - 2, half - 1, half, half + 1, len(batches) - 2})


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_a_replacement_begins_at_any_batch(make: Make, feeders: Feeders) -> None:
    """Where no feeder has it any more it is made again: the first batch is its predecessor's newest."""
    seed()
    first = feeders.mapped(make())
    batches, records = recorded(first, first.position)
    first.close()
    for k in bounds(batches, getattr(first, "num_workers", 0) > 0):
        number, position, _ = records[k]
        torch.manual_seed(1000 + k)
        loader = feeders.mapped(make(), name=f"again-{feeders.newest}")
        assert isinstance(loader, PositionedLoader)
        loader.begin_at(pickle.loads(position))
        rest = list(epoch(loader, number))
        same(rest, batches[k : len(batches) // EPOCHS * (number + 1)])
        loader.close()


@pytest.mark.parametrize(
    "make", [LOADERS["shuffled"], LOADERS["shuffled, workers"], MIXED["augmented"]], ids=["map", "workers", "augmented"]
)
def test_a_replacement_is_fed_by_its_predecessor_s_feeder(make: Make, feeders: Feeders) -> None:
    """While that lives, no sample is read again; positions go on from there."""
    seed()
    expected = train(feeders.mapped(make()), 1)
    user = make()
    seed()
    first = feeders.mapped(user, name=f"kept-{feeders.newest}")
    batches = iter(first)
    found = [next(batches) for _ in range(2)]
    for _ in range(2):
        position = pickle.loads(pickle.dumps(first.position()))
        first.close(bye=False)
        loader = feeders.mapped(user, name=first._stream.name)
        loader.begin_at(position)
        batches = iter(loader)
        assert torch.equal(next(batches), found[-1])
        loader.adopt(position)
        found.append(next(batches))
        first = loader
    found.extend(batches)
    same(found, expected)
    assert len(feeders.started) == 2 and user.dataset.reads.most() == 1


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_a_checkpoint_goes_on_with_the_next_batch(make: Make, feeders: Feeders) -> None:
    """Saved after any batch, or when the epoch is over; the rest and the next epoch are the same, and what training draws."""
    ended = False
    seed()
    first = feeders.mapped(make(), over=lambda: ended)
    batches, records = [], []
    for number in range(EPOCHS):
        ended = False
        for batch in epoch(first, number):
            batches.append(batch)
            records.append((number, pickle.dumps(first.state_dict())))
        ended = True
        records[-1] = (number, pickle.dumps(first.state_dict()))
    generators = state()
    half = len(batches) // EPOCHS
    for k in bounds(batches, getattr(first, "num_workers", 0) > 0):
        number, saved = records[k]
        torch.manual_seed(1000 + k)
        loader = feeders.mapped(make())
        loader.load_state_dict(pickle.loads(saved))
        same(go_on(loader, number + (k % half == half - 1)), batches[k + 1 :])
        assert state() == generators
        loader.close()


def test_only_the_next_epoch_begins_there(feeders: Feeders) -> None:
    loader = feeders.mapped(of(Samples()))
    batches = iter(loader)
    next(batches), next(batches)
    saved = loader.state_dict()
    loader.load_state_dict(saved)
    assert [len(list(loader)), len(list(loader))] == [8, 10]


def test_states_of_others_are_refused(feeders: Feeders) -> None:
    loader = feeders.mapped(of(Samples()))
    batches = iter(loader)
    next(batches)
    with pytest.raises(ValueError, match=r"has the keys \['_snapshot'\]: it was not saved with mapped data; resume it without"):
        loader.load_state_dict({"_snapshot": 1})
    own = loader.state_dict()
    with pytest.raises(ValueError, match="has version 0, this is 1: resume it with the version of lightning_gemini that saved it, or from"):
        loader.load_state_dict({**own, "version": 0})
    key = entries(own)
    with pytest.raises(ValueError, match="in the middle of an epoch by 2 ranks, this job has 1: resume it with 2, or from a checkpoint at"):
        loader.load_state_dict({**own, key: own[key] * 2})


def entries(saved: dict[str, Any]) -> str:
    """The key under which the ranks' entries are."""
    return next(key for key, value in saved.items() if isinstance(value, list))


def test_the_end_of_an_epoch_fits_any_number_of_ranks(feeders: Feeders) -> None:
    loader = feeders.mapped(of(Samples()), over=lambda: True)
    list(loader)
    own = loader.state_dict()
    key = entries(own)
    loader.load_state_dict({**own, key: own[key] * 2})
    assert len(list(loader)) == 10
    assert all(isinstance(entry, torch.Tensor) for entry in own[key]), "a weights_only load takes it"
    assert checkpoint.unpack(own)["over"] is True


def test_what_the_loop_has_read_ahead_comes_again(feeders: Feeders) -> None:
    """Lightning takes one more batch than it uses where the data has no length."""
    seed()
    expected = list(feeders.mapped(of(Lines())))
    loader = feeders.mapped(of(Lines()), ahead=lambda: 1)
    batches = iter(loader)
    for _ in range(4):
        next(batches)
    again = feeders.mapped(of(Lines()))
    again.load_state_dict(pickle.loads(pickle.dumps(loader.state_dict())))
    same(list(again), expected[3:])
    replaced = feeders.mapped(of(Lines()))
    replaced.begin_at(pickle.loads(pickle.dumps(loader.position(1))))
    same(list(replaced), expected[2:])


def test_what_the_user_does_to_a_batch_stays_here(feeders: Feeders) -> None:
    loader = feeders.mapped(of(Samples()), name="modified-" + str(id(feeders)))
    batches = iter(loader)
    next(batches)
    batch = next(batches)
    expected = batch.clone()
    position = pickle.loads(pickle.dumps(loader.position()))
    batch.fill_(-1)
    again = feeders.mapped(of(Samples()), name=loader._stream.name)
    again.begin_at(position)
    assert torch.equal(next(iter(again)), expected) and len(feeders.started) == 1


def test_an_epoch_that_is_left_early(feeders: Feeders) -> None:
    """The next one is as after the bare loader; feeders do not pile up."""

    def left(loader: Any) -> list[Any]:
        found = []
        for number in range(5):
            for i, batch in enumerate(epoch(loader, number)):
                found.append(batch)
                if i == 2:
                    break
        return found

    seed()
    expected, generators = left(of(Samples(), shuffle=True)), state()
    seed()
    same(left(feeders.mapped(of(Samples(), shuffle=True))), expected)
    assert state() == generators


def test_it_stands_for_the_user_s_loader(feeders: Feeders) -> None:
    user = of(Samples(), batch_size=4)
    loader = feeders.mapped(user)
    assert len(loader) == 5 and loader.batch_size == 4 and loader.dataset is user.dataset
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = loader.nothing
    draw()
    assert loader.position()["count"] == 0 and not feeders.started, "nothing is forked before the first batch is asked for"
