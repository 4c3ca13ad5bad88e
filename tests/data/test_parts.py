"""Counters that data sets and samplers keep: found, put back, and only what has changed is taken over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler

from lightning_gemini.data.parts import changed, counting, restore_scalars, scalars
from lightning_gemini.data.position import PositionedLoader


class Epochs(IterableDataset[Any]):
    """Shuffles by an epoch that it counts itself, as many streams do."""

    def __init__(self) -> None:
        self.epoch, self.name, self.table = 0, "stream", [1, 2]

    def __iter__(self) -> Iterator[Any]:
        self.epoch += 1
        yield from torch.randperm(8, generator=torch.Generator().manual_seed(self.epoch)).split(2)


class Turning(Sampler[int]):
    """Another order in each epoch, by a counter of its own."""

    def __init__(self) -> None:
        self.turn = 0

    def __iter__(self) -> Iterator[int]:
        self.turn += 1
        yield from [(i + self.turn) % 5 for i in range(5)]

    def __len__(self) -> int:
        return 5


def test_plain_values_of_all_parts() -> None:
    loader = DataLoader(list(range(5)), batch_sampler=BatchSampler(Turning(), 2, False))
    found = scalars(counting(loader))
    assert found["batch_sampler."] == {"batch_size": 2, "drop_last": False} and found["batch_sampler.sampler."] == {"turn": 0}
    assert "" not in found
    stream = DataLoader(Epochs(), batch_size=None)
    assert scalars(counting(stream))["dataset."] == {"epoch": 0, "name": "stream"}


def test_what_has_changed_and_putting_it_back() -> None:
    loader = DataLoader(Epochs(), batch_size=None)
    before = scalars(counting(loader))
    list(loader)
    after = scalars(counting(loader))
    assert changed(before, after) == {"dataset.": {"epoch": 1}} and changed(after, after) == {}
    restore_scalars(counting(loader), before)
    assert loader.dataset.epoch == 0 and loader.dataset.table == [1, 2]


def test_a_position_has_them_where_nothing_else_changes_them() -> None:
    """A loader made anew reads the epoch that its predecessor read."""
    whole = PositionedLoader(DataLoader(Epochs(), batch_size=None), scalars=True)
    list(whole)
    second = iter(whole)
    batches = [next(second), next(second)]
    again = PositionedLoader(DataLoader(Epochs(), batch_size=None), scalars=True)
    again.begin_at(whole.position())
    rest = list(again)
    assert torch.equal(rest[0], batches[1]) and len(rest) == 3
    assert again.dataset.epoch == 2
