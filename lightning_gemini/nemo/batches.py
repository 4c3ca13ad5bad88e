"""A step that is repeated sees the batches that it saw before.

Seam: NeMo hands its training step the iterator of the loader, and each micro-batch is fetched within the step. `Batches.of(iterator)`
stands for that iterator: what it fetches is kept until `forget`, which is called once per step. When the step is repeated, `of` makes it
hand the kept ones out first, in fresh containers, because a step may take its batch apart. A fetch without workers draws from the global
generators, between the draws of two forward passes: with each batch goes what they were after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lightning_gemini.state import rng

_CPU = torch.device("cpu")


class Batches(Iterator[Any]):
    """The loader's iterator, with the batches of the present step kept."""

    def __init__(self) -> None:
        self._inner: Iterator[Any] = iter(())
        self._kept: list[tuple[Any, dict[str, Any]]] = []
        """Batches, and the generators after each."""
        self._next = 0

    def of(self, inner: Iterator[Any]) -> Batches:
        """This, over the iterator that the loop gives; from the first batch of the step."""
        self._inner, self._next = inner, 0
        return self

    def forget(self) -> None:
        """A step begins."""
        self._kept.clear()
        self._next = 0

    def __next__(self) -> Any:
        repeated = self._next < len(self._kept)
        if not repeated:
            batch = next(self._inner)
            self._kept.append((batch, rng.capture(_CPU)))
        batch, after = self._kept[self._next]
        if repeated:
            rng.restore(after, _CPU)
        self._next += 1
        return torch.utils._pytree.tree_map(lambda leaf: leaf, batch)

    def __getattr__(self, name: str) -> Any:  # `done`, `fetched` of Lightning's own
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._inner, name)
