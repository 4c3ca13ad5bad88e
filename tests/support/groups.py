"""A `World` of one process that reaches nobody, for groups that answer alone or replay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lightning_gemini.rendezvous.world import World

SIZE, RANK = 3, 1


class LoneMembership:
    """Nobody announces anything, unless a test does."""

    announced = 0


def lone_world() -> Iterator[World]:
    """The body of a fixture."""
    yield World(LoneMembership(), 5.0)


def t(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def options(kind: Any, **fields: Any) -> Any:
    made = kind()
    for name, value in fields.items():
        setattr(made, name, value)
    return made
