"""A repeated step sees its batches again, and the generators with them; a loader resumed before a fetch goes on with the next batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_gemini.data.position import PositionedLoader
from lightning_gemini.nemo.batches import Batches
from lightning_gemini.state import rng

CPU = torch.device("cpu")


class Noise(Dataset[torch.Tensor]):
    """Draws from the global generator, as augmentation does."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.stack([torch.tensor(float(index)), torch.rand(())])


def step(batches: Batches, loader: Any) -> list[list[float]]:
    """Two micro-batches, each followed by a forward pass that draws."""
    seen = []
    for batch in (next(batches.of(loader) if number == 0 else batches) for number in range(2)):
        seen.append([*batch.flatten().tolist(), float(torch.rand(()))])
    return seen


def test_a_repeated_step_sees_the_same() -> None:
    torch.manual_seed(1)
    loader, batches = iter(DataLoader(Noise(), batch_size=2)), Batches()
    batches.forget()
    entry = rng.capture(CPU)
    first = step(batches, loader)
    after = rng.capture(CPU)
    for _ in range(2):
        rng.restore(entry, CPU)
        assert step(batches, loader) == first
        assert rng.capture(CPU) == after
    batches.forget()
    assert step(batches, loader)[0][0] == 4.0


def test_a_step_that_failed_between_fetches_fetches_the_rest() -> None:
    loader, batches = iter([{"a": [1]}, {"a": [2]}, {"a": [3]}]), Batches()
    batches.forget()
    taken = next(batches.of(loader))
    taken["a"].clear()  # what a step does to its batch must not be seen when it is repeated
    assert [next(batches.of(loader)), next(batches)] == [{"a": [1]}, {"a": [2]}]
    batches.forget()
    assert next(batches.of(loader)) == {"a": [3]}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fetched", [0, 1, 3])
def test_resumed_before_a_fetch(workers: int, fetched: int) -> None:
    """`ahead` -1: a step fetches its batches after the boundary."""

    def make() -> PositionedLoader:
        return PositionedLoader(DataLoader(Noise(), batch_size=2, shuffle=True, num_workers=workers))

    torch.manual_seed(5)
    loader = make()
    batches = iter(loader)
    for _ in range(fetched):
        next(batches)
    position, state = loader.position(-1), rng.capture(CPU)
    expected = [batch.tolist() for batch in batches]
    after = rng.capture(CPU)

    torch.manual_seed(99)
    replaced = make()
    replaced.begin_at(position)
    resumed = iter(replaced)
    rng.restore(state, CPU)
    assert [batch.tolist() for batch in resumed] == expected
    assert rng.capture(CPU) == after


def test_nothing_was_asked_for_yet() -> None:
    assert PositionedLoader(DataLoader(Noise())).position(-1)["count"] == 0
