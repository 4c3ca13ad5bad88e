"""A loader that begins in the middle gives exactly the batches that the undisturbed one gives."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from lightning_gemini.data.position import PositionedLoader
from lightning_gemini.state import rng

CPU = torch.device("cpu")


class Samples(Dataset[torch.Tensor]):
    """Map-style; `noise` draws from the global generators, as augmentation does; remembers what was read."""

    def __init__(self, size: int = 23, noise: bool = False) -> None:
        self.size, self.noise = size, noise
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> torch.Tensor:
        self.read.append(index)
        if not self.noise:
            return torch.tensor([float(index)])
        return torch.tensor([index + float(torch.rand(())), random.random(), np.random.rand()])


class Crops(Samples):
    """Augments with a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = np.random.default_rng(8)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index + self.generator.random()])


class Stream(IterableDataset[torch.Tensor]):
    """Iterable; shuffled through a small buffer with the global generator where asked for."""

    def __init__(self, size: int = 23, shuffled: bool = False) -> None:
        self.size, self.shuffled = size, shuffled

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = torch.utils.data.get_worker_info()
        values = list(range(info.id if info else 0, self.size, info.num_workers if info else 1))
        if self.shuffled:
            values = [values[i] for i in torch.randperm(len(values)).tolist()]
        for value in values:
            yield torch.tensor([float(value)])


Make = Callable[[], DataLoader[Any]]
LOADERS: dict[str, Make] = {
    "in order": lambda: DataLoader(Samples(), batch_size=4),
    "shuffled": lambda: DataLoader(Samples(), batch_size=4, shuffle=True),
    "its own generator": lambda: DataLoader(Samples(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(5)),
    "a generator in the data set": lambda: DataLoader(Crops(), batch_size=4, shuffle=True),
    "with replacement": lambda: DataLoader(Samples(), batch_size=4, sampler=RandomSampler(Samples(), replacement=True, num_samples=40)),
    "augmented": lambda: DataLoader(Samples(noise=True), batch_size=4),
    "shuffled and augmented": lambda: DataLoader(Samples(noise=True), batch_size=4, shuffle=True, drop_last=True),
    "batch sampler": lambda: DataLoader(Samples(), batch_sampler=BatchSampler(SequentialSampler(Samples()), 5, False)),
    "distributed": lambda: DataLoader(Samples(), batch_size=3, sampler=DistributedSampler(Samples(), 2, 1, seed=9)),
    "no batches": lambda: DataLoader(Samples(), batch_size=None, shuffle=True),
    "no batches, augmented": lambda: DataLoader(Samples(size=9, noise=True), batch_size=None, shuffle=True),
    "stream": lambda: DataLoader(Stream(), batch_size=4),
    "shuffled stream": lambda: DataLoader(Stream(shuffled=True), batch_size=4),
}


def seed() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)


def train_step() -> None:
    """What the job draws between two fetches."""
    torch.rand(3)
    random.random()


def epoch_of(loader: PositionedLoader, epoch: int) -> Iterator[torch.Tensor]:
    """As Lightning: the epoch is set, the iterator made, something is drawn before the first fetch, then batch by batch."""
    batches = iter(loader)
    if isinstance(loader.sampler, DistributedSampler):
        loader.sampler.set_epoch(epoch)
    torch.rand(1)
    for batch in batches:
        train_step()
        yield batch


def undisturbed(make: Make, epochs: int = 2) -> tuple[list[tuple[int, torch.Tensor]], list[bytes]]:
    """All batches with their epoch, and the state as a snapshot keeps it after each."""
    seed()
    loader, batches, snapshots = PositionedLoader(make()), [], []
    for epoch in range(epochs):
        for batch in epoch_of(loader, epoch):
            batches.append((epoch, batch))
            snapshots.append(pickle.dumps((loader.position(), rng.capture(CPU))))
    return batches, snapshots


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_resumed_at_each_batch(make: Make) -> None:
    """Entering at batch k, the state of that boundary is put back when the batch has been handed out: the rest is the same."""
    batches, snapshots = undisturbed(make)
    for k, (epoch, batch) in enumerate(batches):
        position, state = pickle.loads(snapshots[k])
        torch.manual_seed(1000 + k)  # a new process is somewhere else altogether
        loader = PositionedLoader(make())
        loader.begin_at(position)
        resumed = iter(loader)
        if isinstance(loader.sampler, DistributedSampler):
            loader.sampler.set_epoch(epoch)
        torch.rand(5)
        first = next(resumed)
        assert torch.equal(first, batch), f"batch {k} is another one"
        loader.adopt(position)
        rng.restore(state, CPU)
        rest = []
        for other in resumed:
            train_step()
            rest.append(other)
        for following in range(epoch + 1, 2):
            rest.extend(epoch_of(loader, following))
        same(rest, [b for _, b in batches[k + 1 :]])


@pytest.mark.parametrize("make", [LOADERS["shuffled and augmented"], LOADERS["shuffled stream"]], ids=["map", "stream"])
def test_resumed_twice(make: Make) -> None:
    """The replacement dies too: its positions are as good as the original's."""
    batches, snapshots = undisturbed(make, epochs=1)
    position, state = pickle.loads(snapshots[1])
    for k in range(2, len(batches)):
        loader = PositionedLoader(make())
        loader.begin_at(position)
        resumed = iter(loader)
        next(resumed)
        loader.adopt(position)
        rng.restore(state, CPU)
        assert torch.equal(next(resumed), batches[k][1])
        train_step()
        position, state = pickle.loads(pickle.dumps((loader.position(), rng.capture(CPU))))


def reseed(worker: int) -> None:
    """As users do."""
    random.seed(100 + worker)
    np.random.seed(torch.initial_seed() % 2**32)


WITH_WORKERS: dict[str, Make] = {
    "map": lambda: DataLoader(Samples(16), batch_size=4, shuffle=True, num_workers=2),
    "stream": lambda: DataLoader(Stream(16), batch_size=4, num_workers=2),
    "persistent": lambda: DataLoader(Samples(16), batch_size=4, shuffle=True, num_workers=2, persistent_workers=True),
    "augmented": lambda: DataLoader(Samples(20, noise=True), batch_size=4, shuffle=True, num_workers=2),
    "augmented, three": lambda: DataLoader(Samples(20, noise=True), batch_size=4, num_workers=3, worker_init_fn=reseed),
    "augmented, persistent": lambda: DataLoader(Samples(20, noise=True), batch_size=4, num_workers=2, persistent_workers=True),
    "a generator in the data set": lambda: DataLoader(Crops(), batch_size=5, shuffle=True, num_workers=2, persistent_workers=True),
    "no batches": lambda: DataLoader(Samples(5, noise=True), batch_size=None, num_workers=2, persistent_workers=True),
}


@pytest.mark.parametrize("make", WITH_WORKERS.values(), ids=WITH_WORKERS)
def test_with_workers(make: Make) -> None:
    """Also the epochs after the one that was entered in the middle."""
    batches, snapshots = undisturbed(make, epochs=3)
    for k in (0, 1, 2, 4, 6, 7, 9, 11):
        epoch = batches[k][0]
        position, state = pickle.loads(snapshots[k])
        loader = PositionedLoader(make())
        loader.begin_at(position)
        resumed = iter(loader)
        found = [next(resumed)]
        rng.restore(state, CPU)
        for batch in resumed:
            train_step()
            found.append(batch)
        for following in range(epoch + 1, 3):
            found.extend(epoch_of(loader, following))
        same(found, [b for _, b in batches[k:]])


@pytest.mark.parametrize("shuffle", [False, True])
def test_skipped_samples_are_not_read(shuffle: bool) -> None:
    seed()
    whole = PositionedLoader(DataLoader(Samples(), batch_size=4, shuffle=shuffle))
    batches = iter(whole)
    for _ in range(4):
        next(batches)
    data = Samples()
    loader = PositionedLoader(DataLoader(data, batch_size=4, shuffle=shuffle))
    loader.begin_at(whole.position())
    batch = next(iter(loader))
    assert data.read == batch.flatten().int().tolist() and len(data.read) == 4


def test_a_position_before_the_first_batch_is_the_beginning() -> None:
    loader = PositionedLoader(DataLoader(Samples(), batch_size=4))
    loader.begin_at(loader.position())
    assert len(list(loader)) == 6


def test_only_the_next_iterator_begins_in_the_middle() -> None:
    loader = PositionedLoader(DataLoader(Samples(), batch_size=4))
    batches = iter(loader)
    next(batches), next(batches)
    loader.begin_at(loader.position())
    assert len(list(loader)) == 5
    assert len(list(loader)) == 6
    assert loader.position()["count"] == 6


def test_it_stands_for_the_user_s_loader() -> None:
    inner = DataLoader(Samples(), batch_size=4)
    loader = PositionedLoader(inner)
    assert len(loader) == 6 and loader.batch_size == 4 and loader.dataset is inner.dataset
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = loader.nothing
    assert len(list(pickle.loads(pickle.dumps(loader)))) == 6


def test_a_plain_iterable_is_a_loader_too() -> None:
    loader = PositionedLoader([1, 2, 3, 4])
    batches = iter(loader)
    assert [next(batches), next(batches)] == [1, 2]
    loader.begin_at(loader.position())
    assert list(loader) == [2, 3, 4]
