"""An exception of the user's data, from the process that reads it to the rank: as itself, with the sample that raised it.

Seam: `name_samples(loader)` makes the data set say which sample raised (in the feeder's own copy of it); `carry` and `reproduce` take an
exception through a file. What cannot be pickled arrives as a `RuntimeError` with the same text.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import traceback
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset


def name_samples(loader: Any) -> None:
    """Make errors of `loader`'s data set name the sample. A data set whose class cannot be changed keeps its errors as they are."""
    if not isinstance(loader, DataLoader) or _method(loader) != "fork":
        return
    data = loader.dataset
    kind = type(data)
    methods = {"__iter__": _iterating} if isinstance(data, IterableDataset) else {"__getitem__": _indexing, "__getitems__": _indexing}
    own = {name: wrap(getattr(kind, name)) for name, wrap in methods.items() if hasattr(kind, name)}
    with contextlib.suppress(TypeError):
        data.__class__ = type(kind.__name__, (kind,), {**own, "__module__": kind.__module__, "__qualname__": kind.__qualname__})


def _method(loader: DataLoader[Any]) -> str | None:
    if not loader.num_workers:
        return "fork"
    context: Any = loader.multiprocessing_context or multiprocessing.get_context()
    method: str | None = context.get_start_method()
    return method


def _indexing(method: Any) -> Any:
    def get(self: Any, index: Any) -> Any:
        try:
            return method(self, index)
        except StopIteration as error:  # the loader would take it for the end of the epoch
            raise note(RuntimeError("the data set raised StopIteration"), f"in sample {index!r}") from error
        except Exception as error:
            raise note(error, f"in sample {index!r} of {type(self).__name__}") from error.__cause__

    return get


def _iterating(method: Any) -> Any:
    def iterate(self: Any) -> Iterator[Any]:
        count = 0
        try:
            for sample in method(self):
                yield sample
                count += 1
        except Exception as error:
            raise note(error, f"in sample {count} (counted from 0) of this iterator over {type(self).__name__}") from error.__cause__

    return iterate


def note(error: BaseException, text: str) -> BaseException:
    """Add a line that tracebacks show (PEP 678, also where Python is older and only keeps it)."""
    notes = error.__dict__.setdefault("__notes__", [])
    if text not in notes:
        notes.append(text)
    return error


def carry(error: BaseException) -> bytes:
    """The exception, with its traceback's text as a note."""
    text = "".join(traceback.format_exception(error))
    try:
        data = pickle.dumps(note(error, f"in the loader process:\n{text}"))
        pickle.loads(data)
        return data
    except Exception:
        return pickle.dumps(note(RuntimeError(f"{type(error).__name__}: {error}"), f"in the loader process:\n{text}"))


def reproduce(data: bytes) -> BaseException:
    """Inverse of `carry`."""
    error = pickle.loads(data)
    assert isinstance(error, BaseException)
    return error
