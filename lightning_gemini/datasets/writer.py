"""Writes Megatron's indexed data set (the format is told in `indexed`).

Seam: `add` one sequence, `end_document` after the last sequence of each, `finish` once; or use it as a context manager, which finishes, or
after an error removes both files. States: open -> finished | abandoned.

Failures: a token that the dtype cannot hold is a `ValueError` (numpy would wrap it around); files that exist already are a
`FileExistsError`; a full disk is the system's `OSError`. In all cases nothing valid is left: the index is written last.
"""

from __future__ import annotations

import array
import os
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from lightning_gemini.datasets.files import Output, Written
from lightning_gemini.datasets.indexed import DTYPES, HEADER, MAGIC, VERSION, paths_of
from lightning_gemini.datasets.store import Array

_CODES = {dtype: code for code, dtype in DTYPES.items()}


class IndexedWriter:
    """Writes `<prefix>.bin` and `<prefix>.idx` of tokens of one dtype; see the module's docstring."""

    def __init__(self, prefix: str | os.PathLike[str], dtype: DTypeLike, *, mode: int = 0o600) -> None:
        self.dtype: np.dtype[Any] = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in _CODES:
            raise ValueError(f"dtype={dtype!r} is not valid: choose one of {', '.join(d.name for d in DTYPES.values())}")
        self._paths, self._mode = paths_of(prefix), mode
        self._data: Output | None = Output(self._paths[0], mode)
        self._index: Output | None = None
        self._lengths, self._documents = array.array("i"), array.array("q", [0])

    def add(self, tokens: ArrayLike) -> None:
        """One sequence."""
        if self._data is None:
            raise RuntimeError(f"{self._paths[0]} is closed")
        found = fitting(tokens, self.dtype)
        if len(found) >= 1 << 31:
            raise ValueError(f"a sequence of {len(found)} tokens is too long for the format: at most {(1 << 31) - 1}")
        self._data.write(found.tobytes())
        self._lengths.append(len(found))

    def end_document(self) -> None:
        self._documents.append(len(self._lengths))

    def finish(self) -> tuple[Written, Written]:
        """Write the index; sizes and checksums of the .bin and the .idx."""
        if self._data is None:
            raise RuntimeError(f"{self._paths[0]} is closed")
        if self._documents[-1] != len(self._lengths):  # sequences after the last `end_document` are a document too
            self.end_document()
        data = self._data.finish()
        self._index = Output(self._paths[1], self._mode)
        lengths = np.frombuffer(self._lengths, np.int32) if self._lengths else np.zeros(0, np.int32)
        pointers = (np.cumsum(lengths, dtype=np.int64) - lengths) * self.dtype.itemsize
        code = _CODES[self.dtype]
        self._index.write(HEADER.pack(MAGIC, VERSION, code, len(lengths), len(self._documents)))
        for part in (lengths.astype("<i4"), pointers.astype("<i8"), np.frombuffer(self._documents, np.int64).astype("<i8")):
            self._index.write(part.tobytes())
        index = self._index.finish()
        self._data = self._index = None
        return data, index

    def abandon(self) -> None:
        """Remove what was written."""
        for output, path in ((self._data, self._paths[0]), (self._index, self._paths[1])):
            if output is not None:
                output.abandon()
                path.unlink(missing_ok=True)
        self._data = self._index = None

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self.abandon()
        elif self._data is not None:
            try:
                self.finish()
            except BaseException:
                self.abandon()
                raise


def fitting(tokens: ArrayLike, dtype: np.dtype[Any]) -> Array:
    """`tokens` as an array of `dtype`, refused where a value would change."""
    found = np.asarray(tokens)
    if found.ndim != 1:
        raise ValueError(f"a sequence of tokens has one dimension, not the shape {found.shape}")
    if found.dtype != dtype and len(found):
        if found.dtype.kind not in ("iu" if dtype.kind in "iu" else "iuf"):
            raise ValueError(f"tokens of type {found.dtype} cannot be kept as {dtype}")
        if dtype.kind in "iu":
            low, high, limits = int(found.min()), int(found.max()), np.iinfo(dtype)
            if low < limits.min or high > limits.max:
                raise ValueError(f"tokens from {low} to {high} do not fit {dtype}: choose a larger dtype or vocabulary_size")
    return found.astype(dtype, copy=False)
