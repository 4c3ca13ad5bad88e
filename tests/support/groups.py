"""A `World` of one process that reaches nobody, for groups that answer alone or replay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lightning_gemini.agent.memory import NodeFiles, create_files
from lightning_gemini.rendezvous.world import World

SIZE, RANK = 3, 1


class LoneLink:
    """Knows what a `Link` knows, and reaches nobody."""

    def __init__(self, files: NodeFiles) -> None:
        self.world, self.rank, self.announced, self.files = SIZE, RANK, 0, files


def lone_world() -> Iterator[World]:
    """The body of a fixture."""
    files = create_files(SIZE)
    yield World(LoneLink(files), 5.0)  # type: ignore[arg-type]
    files.close()


def t(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def options(kind: Any, **fields: Any) -> Any:
    made = kind()
    for name, value in fields.items():
        setattr(made, name, value)
    return made
