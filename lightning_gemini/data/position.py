"""A training loader that knows where it is, and can begin there.

Seam: wraps what `train_dataloader` returned. It records, per epoch, the generators at `iter()`, at the first fetch and before the newest
fetch (samplers and datasets draw from them), and how many batches were handed out. `begin_at` makes the next iterator start at a
recorded position: a loader with a state of its own (`state_dict`, `load_state_dict`: torchdata's StatefulDataLoader) is given it; map-style
data is skipped through its batch sampler without reading; other data is read and dropped.

The generators are the global ones and those that the loader, its samplers and its data set hold.

Generators of the loader's workers: see `workers`. Not covered: iterable data without workers whose *order* depends on what else draws from
the global generators between two batches.
"""

from __future__ import annotations

import copy
import functools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_gemini.data.parts import counting, held_by, restore_scalars, scalars
from lightning_gemini.data.workers import Trace, traceable, untraced
from lightning_gemini.state import rng

_CPU = torch.device("cpu")
READ_AHEAD = 4
"""Batches that a loop may read ahead; Lightning's reads one where the data has no length."""


class PositionedLoader:
    """Stands for the user's loader; every attribute is the loader's own.

    With `scalars` a position also has the plain values that data set and samplers keep as attributes: counters of their epochs, for
    instance. For a process in which nothing but the loader changes them.
    """

    def __init__(self, loader: Any, *, scalars: bool = False) -> None:
        self._loader = loader
        self._counting = counting(loader) if scalars else {}
        self._count = 0
        self._at_iter: dict[str, Any] | None = None
        self._at_first: dict[str, Any] | None = None
        self._at_fetch: deque[dict[str, Any]] = deque(maxlen=READ_AHEAD + 1)
        self._own: deque[Any] = deque(maxlen=READ_AHEAD + 1)
        """What the loader itself says about the place before each of the newest fetches."""
        self._keeps_state = all(callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict"))
        self._trace = Trace(loader, READ_AHEAD) if traceable(loader) else None
        self._reused = False
        self._begin: dict[str, Any] | None = None
        self._generators: dict[str, Any] = {}
        self._carried: dict[str, Any] | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # unpickling asks before it is there
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def position(self, ahead: int = 0) -> dict[str, Any]:
        """Where the newest batch came from; `ahead` batches have been read after it that the loop has not taken yet. -1: where the next one
        will come from, which is fetched after the generators have been put back."""
        if ahead < 0:
            count = self._count + 1 if self._at_iter is not None else 0
            return {"count": count, "reused": self._reused, "workers": self.workers_at(self._count), "at_iter": self._at_iter,
                    "at_first": self._at_first, "at_fetch": [], "loader": self.own_state() if self._count else None}  # fmt: skip
        fetches = list(self._at_fetch)[-(ahead + 1) :]
        own = list(self._own)[-(ahead + 1)] if len(self._own) > ahead else None
        at = {"at_iter": self._at_iter, "at_first": self._at_first, "at_fetch": fetches, "loader": own}
        return {"count": self._count - ahead, "reused": self._reused, "workers": self.workers_at(self._count - ahead - 1), **at}

    def workers_at(self, number: int) -> list[bytes | None] | None:
        """What the workers' generators were when they were to make batch `number`; None without workers, or without need to know."""
        return self._trace.at(number) if self._trace is not None and number >= 0 else None

    def own_state(self) -> Any:
        """The state of a loader that keeps one; None otherwise."""
        return self._loader.state_dict() if self._keeps_state else None

    def adopt(self, position: dict[str, Any]) -> None:
        """Take over the records of a position (after the state of a boundary was restored)."""
        self._at_iter, self._at_first = position["at_iter"], position["at_first"]

    def begin_at(self, position: dict[str, Any]) -> None:
        """The next iterator yields the batch of `position` first."""
        self._begin = position

    def __iter__(self) -> Iterator[Any]:
        begin, self._begin = self._begin, None
        self._generators = held_by(self._loader)
        self._at_fetch.clear()
        self._own.clear()
        if begin is not None and begin["count"]:
            return self._resumed(begin)
        if begin is not None and begin["at_iter"]:
            self._restore(begin["at_iter"])
        self._count, self._at_iter = 0, self.capture()
        loader = self._loader if self._trace is None else self._trace.loader
        self._reused = getattr(loader, "_iterator", None) is not None  # persistent workers: the iterator of the last epoch goes on
        if self._trace is not None:
            self._trace.begin(reused=self._reused)
        return self._recorded(self._started(loader, 0), begin["at_fetch"] if begin else [])

    def _started(self, loader: Any, first: int) -> Iterator[Any]:
        inner = iter(loader)
        if loader is not self._loader:
            self._loader._iterator = loader._iterator  # persistent workers: whoever ends the loader ends them
            if self._trace is not None:
                self._trace.loader._iterator = loader._iterator
        return untraced(inner, self._trace, first)

    def capture(self) -> dict[str, Any]:
        """The generators now, the global ones and those held by the loader; and the scalars, where they are asked for."""
        state = {"global": rng.capture(_CPU), "held": rng.capture_private(self._generators)}
        return state | {"scalars": scalars(self._counting)} if self._counting else state

    def carry(self) -> dict[str, Any]:
        """`capture`, where nothing will change before the next batch is asked for: it is not captured again then."""
        self._carried = self.capture()
        return self._carried

    def _restore(self, state: dict[str, Any]) -> None:
        rng.restore(state["global"], _CPU)
        rng.restore_private(self._generators, state["held"])
        restore_scalars(self._counting, state.get("scalars", {}))

    def _recorded(self, inner: Iterator[Any], states: list[dict[str, Any]]) -> Iterator[Any]:
        """`states` are those of the first fetches, as recorded."""
        known = iter(states)
        while True:
            state = next(known, None)
            if state is not None:
                self._restore(state)
            state, self._carried = self._carried or self.capture(), None
            own = self.own_state() if self._count else None
            if self._count == 0:
                self._at_first = state
            try:
                batch = next(inner)
            except StopIteration:
                return
            self._at_fetch.append(state)
            self._own.append(own)
            self._count += 1
            yield batch

    def _resumed(self, begin: dict[str, Any]) -> Iterator[Any]:
        """Lazy, so that the sampler's epoch is set before the sampler is asked."""
        skip = begin["count"] - 1
        self._at_iter, self._at_first = begin["at_iter"], begin["at_first"]
        self._reused = begin["reused"]
        if not begin["at_fetch"]:  # nothing restores the generators before this fetch: they are right now
            begin = begin | {"at_fetch": [self.capture()], "at_first": begin["at_first"] or self.capture()}
        self._restore(begin["at_iter"])
        loader, workers = self._loader, getattr(self._loader, "num_workers", 0)
        if begin.get("loader") is not None:
            loader.load_state_dict(begin["loader"])
            inner = iter(loader)
        elif isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
            inner = self._skipped(begin, skip)
        else:
            inner = iter(loader)
            if not workers:
                self._restore(begin["at_first"])
            for _ in range(skip):
                next(inner)
            self._restore(begin["at_fetch"][0])
        self._count = skip
        yield from self._recorded(inner, begin["at_fetch"])

    def _skipped(self, begin: dict[str, Any], skip: int) -> Iterator[Any]:
        trace = self._trace
        first = skip if trace is None else trace.first_of(skip)
        clone = copy.copy(self._loader if trace is None else trace.loader)
        name = "sampler" if clone.batch_sampler is None else "batch_sampler"
        sampler = _Skipping(getattr(clone, name), first, functools.partial(self._at_draw, begin, clone.num_workers > 0))
        object.__setattr__(clone, name, sampler)  # DataLoader refuses a new sampler, but reads it only in iter()
        if trace is not None:
            trace.resume(clone, begin["workers"], skip)
        inner = self._started(clone, first)
        for _ in range(skip - first):
            next(inner)
        return inner

    def _at_draw(self, begin: dict[str, Any], workers: bool, *, skipped: bool) -> None:
        """Called before the sampler gives the first batch, and before it gives the one resumed."""
        if not workers:
            self._restore(begin["at_fetch"][0] if skipped else begin["at_first"])
        elif begin["reused"] and not skipped:  # a new iterator has drawn a seed for its workers, one that goes on has not
            self._restore(begin["at_iter"])


class _Skipping:
    """A batch sampler that leaves out `skip` batches once, when it is used first."""

    def __init__(self, sampler: Any, skip: int, at_draw: Callable[..., None]) -> None:
        self._sampler, self._skip = sampler, skip
        self._at_draw: Callable[..., None] | None = at_draw

    def __iter__(self) -> Iterator[Any]:
        return self._batches(iter(self._sampler))

    def _batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        at_draw, self._at_draw = self._at_draw, None
        if at_draw is not None:
            at_draw(skipped=False)
            for _ in range(self._skip):
                next(batches)
            at_draw(skipped=True)
            del at_draw  # it leads back to the loader, and the loader to whoever iterates here
        yield from batches

    def __len__(self) -> int:
        return len(self._sampler)
