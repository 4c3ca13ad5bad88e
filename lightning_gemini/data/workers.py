"""The random generators of a loader's workers, so that augmentation in them goes on where it was.

Seam: `Trace(loader).loader` has workers that send their generators' state along with each batch; `Trace` keeps what a position needs and
makes the workers of a resumed loader begin with it. Only map-style data with workers needs it: what is read and dropped from the start has
the right state anyway, and a loader with a state of its own is left alone.

Workers take batches in turn: worker j of W makes the batches j, j + W, … A loader resumed at batch n begins at the multiple of W before n
and drops up to W - 1 batches, so that each worker is again the one it was, in its number, its seed and what `worker_init_fn` did to it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lightning_gemini.state import codec, rng

_CPU = torch.device("cpu")


def traceable(loader: Any) -> bool:
    """Whether its workers' generators can be traced, and need be."""
    return (
        isinstance(loader, DataLoader)
        and loader.num_workers > 0
        and not isinstance(loader.dataset, IterableDataset)
        and not hasattr(loader, "load_state_dict")
    )


class Trace:
    """What the workers' generators were, by batch."""

    def __init__(self, loader: Any, kept: int) -> None:
        self.workers: int = loader.num_workers
        self._kept = kept + 2 * self.workers
        self._initial: list[bytes | None] = [None] * self.workers
        """Before the first batch of the epoch; None where the workers are new."""
        self._after: dict[int, bytes] = {}
        self.loader = copy.copy(loader)
        self.loader.collate_fn = _Collate(loader.collate_fn)

    def begin(self, *, reused: bool) -> None:
        """A new epoch; persistent workers go on with what they have."""
        last = max(self._after, default=-1)
        newest = [self._after.get(last - (last - worker) % self.workers) for worker in range(self.workers)]
        self._initial = newest if reused and self._after else [None] * self.workers
        self._after = {}

    def take(self, number: int, item: Any) -> Any:
        """The batch, once its worker's state is noted."""
        batch, self._after[number] = item
        self._after.pop(number - self._kept, None)
        return batch

    def at(self, number: int) -> list[bytes | None]:
        """Per worker, its state before its first batch from `first_of(number)` on."""
        first = self.first_of(number)
        return [self._after.get(first + worker - self.workers) if first else self._initial[worker] for worker in range(self.workers)]

    def first_of(self, number: int) -> int:
        """Where a loader resumed at batch `number` begins."""
        return number - number % self.workers

    def resume(self, loader: Any, states: list[bytes | None], number: int) -> None:
        """Make the workers of `loader`, which is a copy of the traced one, begin with `states`."""
        loader.worker_init_fn = _Init(loader.worker_init_fn, states)
        first = self.first_of(number)
        self._initial = list(states)
        self._after = {first + worker - self.workers: state for worker, state in enumerate(states) if state is not None and first}


class _Collate:
    """In a worker: the user's, and the state after it."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: Any) -> Any:
        return self.collate(samples), _encoded({"global": rng.capture(_CPU), "held": rng.capture_private(_held())})


class _Init:
    """In a worker: the user's, then the state it had."""

    def __init__(self, init: Callable[[int], None] | None, states: list[bytes | None]) -> None:
        self.init, self.states = init, states

    def __call__(self, worker: int) -> None:
        if self.init is not None:
            self.init(worker)
        data = self.states[worker]
        if data is not None:
            state = codec.decode(data, {}, foreign=True)
            rng.restore(state["global"], _CPU)
            rng.restore_private(_held(), state["held"])


def _encoded(state: dict[str, Any]) -> bytes:
    """It becomes part of the rank-local state, which may be read on another machine."""
    return codec.encode(state, {}, foreign=True)


def _held() -> dict[str, Any]:
    info = get_worker_info()
    return rng.held_by(info.dataset) if info is not None else {}


def untraced(batches: Iterator[Any], trace: Trace | None, first: int) -> Iterator[Any]:
    """The batches themselves, of which the first has number `first`."""
    for number, item in enumerate(batches, first):
        yield item if trace is None else trace.take(number, item)
