"""Generators: what was drawn after a capture is drawn again after its restore."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_gemini.state import rng

CPU = torch.device("cpu")


def draw() -> list[Any]:
    """Some of everything, of odd lengths: half-used buffers of the generators count too."""
    return [
        random.random(),
        random.gauss(0, 1),  # python keeps the second of a pair
        np.random.rand(3).tolist(),
        np.random.randn(),  # and so does numpy
        torch.rand(5).tolist(),
        torch.randn(17).tolist(),
        nn.functional.dropout(torch.ones(20), 0.5).tolist(),
        torch.randperm(10).tolist(),
    ]


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)


@pytest.mark.parametrize("before", [0, 1, 3])
def test_what_follows_is_drawn_again(before: int) -> None:
    for _ in range(before):
        draw()
    state = rng.capture(CPU)
    first = draw()
    draw()
    rng.restore(state, CPU)
    assert draw() == first


def test_a_state_can_be_restored_twice() -> None:
    state = rng.capture(CPU)
    first = draw()
    for _ in range(2):
        rng.restore(state, CPU)
        assert draw() == first


def test_capturing_draws_nothing() -> None:
    state = rng.capture(CPU)
    first = draw()
    rng.restore(state, CPU)
    rng.capture(CPU)
    assert draw() == first


def test_a_state_survives_pickle() -> None:
    state = pickle.loads(pickle.dumps(rng.capture(CPU)))
    rng.restore(state, CPU)
    first = draw()
    rng.restore(state, CPU)
    assert draw() == first


# ---- generators that modules hold


class Augment(nn.Module):
    """As NeMo's augmenters."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.python = random.Random(seed)
        self.numpy = np.random.default_rng(seed)
        self.torch = torch.Generator().manual_seed(seed)
        self.something_else = 5

    def draw(self) -> list[Any]:
        return [self.python.random(), self.python.gauss(0, 1), self.numpy.random(3).tolist(), torch.rand(4, generator=self.torch).tolist()]


def model(seed: int) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(Augment(seed)))


def test_they_are_found_by_path() -> None:
    assert set(rng.private_generators(model(1))) == {"1.0:python", "1.0:numpy", "1.0:torch"}


def test_they_go_on_in_another_process_s_module() -> None:
    old, new = model(1), model(2)
    old[1][0].draw()
    states = pickle.loads(pickle.dumps(rng.capture_private(rng.private_generators(old))))
    expected = old[1][0].draw()
    rng.restore_private(rng.private_generators(new), states)
    assert new[1][0].draw() == expected


def test_they_are_restored_in_place() -> None:
    module = model(1)
    generators = rng.private_generators(module)
    states = rng.capture_private(generators)
    held = module[1][0].torch
    first = module[1][0].draw()
    rng.restore_private(generators, states)
    assert module[1][0].torch is held and module[1][0].draw() == first


def test_generators_that_are_not_there_are_passed_over() -> None:
    states = rng.capture_private(rng.private_generators(model(1)))
    rng.restore_private({}, states)


def test_the_same_generator_in_two_places() -> None:
    first, second = Augment(1), Augment(2)
    second.torch = first.torch
    module = nn.Sequential(first, second)
    generators = rng.private_generators(module)
    states = rng.capture_private(generators)
    drawn = [first.draw(), second.draw()]
    rng.restore_private(generators, states)
    assert [first.draw(), second.draw()] == drawn


def test_numpy_s_older_generator_is_one_too() -> None:
    module = nn.Linear(1, 1)
    module.sampler = np.random.RandomState(4)
    generators = rng.private_generators(module)
    states = rng.capture_private(generators)
    drawn = module.sampler.randn(3).tolist()
    rng.restore_private(generators, pickle.loads(pickle.dumps(states)))
    assert module.sampler.randn(3).tolist() == drawn


def test_the_system_s_generator_has_no_state() -> None:
    module = nn.Linear(1, 1)
    module.secret = random.SystemRandom()
    assert rng.private_generators(module) == {}
