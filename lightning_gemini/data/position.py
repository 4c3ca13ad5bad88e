"""A training loader that knows where it is, and can begin there.

Seam: wraps what `train_dataloader` returned. It records, per epoch, the generators at `iter()`, at the first fetch and before the newest
fetch (samplers and datasets draw from them), and how many batches were handed out. `begin_at` makes the next iterator start at a
recorded position: map-style data is skipped through its batch sampler without reading; other data is read and dropped.

Not covered: random augmentation inside loader *workers* of a map-style data set (their generators live in the workers).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_gemini.state import rng

_CPU = torch.device("cpu")


class PositionedLoader:
    """Stands for the user's loader; every attribute is the loader's own."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._count = 0
        self._at_iter: dict[str, Any] | None = None
        self._at_first: dict[str, Any] | None = None
        self._at_fetch: dict[str, Any] | None = None
        self._begin: dict[str, Any] | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # unpickling asks before it is there
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def position(self) -> dict[str, Any]:
        """Where the newest batch came from."""
        return {"count": self._count, "at_iter": self._at_iter, "at_first": self._at_first, "at_fetch": self._at_fetch}

    def adopt(self, position: dict[str, Any]) -> None:
        """Take over the records of a position (after the state of a boundary was restored)."""
        self._at_iter, self._at_first = position["at_iter"], position["at_first"]

    def begin_at(self, position: dict[str, Any]) -> None:
        """The next iterator yields the batch of `position` first."""
        self._begin = position

    def __iter__(self) -> Iterator[Any]:
        begin, self._begin = self._begin, None
        if begin is not None and begin["count"]:
            return self._resumed(begin)
        self._count, self._at_iter = 0, rng.capture(_CPU)
        return self._recorded(iter(self._loader))

    def _recorded(self, inner: Iterator[Any]) -> Iterator[Any]:
        while True:
            self._at_fetch = rng.capture(_CPU)
            if self._count == 0:
                self._at_first = self._at_fetch
            try:
                batch = next(inner)
            except StopIteration:
                return
            self._count += 1
            yield batch

    def _resumed(self, begin: dict[str, Any]) -> Iterator[Any]:
        """Lazy, so that the sampler's epoch is set before the sampler is asked."""
        skip = begin["count"] - 1
        self._at_iter, self._at_first, self._at_fetch = begin["at_iter"], begin["at_first"], begin["at_fetch"]
        rng.restore(begin["at_iter"], _CPU)
        loader, workers = self._loader, getattr(self._loader, "num_workers", 0)
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset) and loader.batch_sampler is not None:
            clone = copy.copy(loader)
            sampler = _Skipping(loader.batch_sampler, skip, None if workers else (begin["at_first"], begin["at_fetch"]))
            object.__setattr__(clone, "batch_sampler", sampler)  # DataLoader refuses a new sampler, but reads it only in iter()
            inner = iter(clone)
        else:
            inner = iter(loader)
            for _ in range(skip):
                next(inner)
            rng.restore(begin["at_fetch"], _CPU)
        self._count = skip
        while True:
            try:
                batch = next(inner)
            except StopIteration:
                return
            self._count += 1
            yield batch
            self._at_fetch = rng.capture(_CPU)


class _Skipping:
    """A batch sampler without its first `skip` batches; with `generators`, as they were at the first fetch and at the one resumed."""

    def __init__(self, sampler: Any, skip: int, generators: tuple[dict[str, Any], dict[str, Any]] | None) -> None:
        self._sampler, self._skip, self._generators = sampler, skip, generators

    def __iter__(self) -> Iterator[Any]:
        if self._generators is not None:
            rng.restore(self._generators[0], _CPU)
        batches = iter(self._sampler)
        for _ in range(self._skip):
            next(batches)
        first = next(batches, None)
        if self._generators is not None:
            rng.restore(self._generators[1], _CPU)
        if first is not None:
            yield first
            yield from batches

    def __len__(self) -> int:
        return len(self._sampler)
