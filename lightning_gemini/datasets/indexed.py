"""Megatron's indexed data set, read through a memory map: `<prefix>.bin` holds the tokens, `<prefix>.idx` says where each sequence is.

Seam: `IndexedDataset(prefix)`; `len`, `[i]`, `get`, `lengths`, `pointers`, `documents`. Arrays are views of the map: nothing is copied, and
nothing can be written. Little endian, as on every machine that Megatron runs on:

    b"MMIDIDX\\0\\0" | version u64 = 1 | dtype code u8 | sequences u64 | document indices u64
    int32 length of each sequence | int64 byte offset of each | int64 sequence at which each document begins, and the end | [int8 modes]

States: open; there is no other. A pickled one is its prefix and the sizes, and is mapped again where it is unpickled; a forked child
shares its parent's map.

Failures: a file that is missing, foreign, cut short or inconsistent is one `ValueError` that names the file and what is wrong with it.
Opening looks at every length and pointer (`thorough`); where a checksum has vouched for them it need not.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from lightning_gemini.datasets.store import Array

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {code: np.dtype(name) for code, name in enumerate(("<u1", "<i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2"), start=1)}
_AT_ONCE = 1 << 20
"""Entries looked at in one go: an index of 100 million sequences is checked without a copy of it."""


def paths_of(prefix: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The .bin and the .idx of a prefix; either of the two names will do as well."""
    text = os.fspath(prefix)
    if text.endswith((".bin", ".idx")):
        text = text[:-4]
    return Path(f"{text}.bin"), Path(f"{text}.idx")


class IndexedDataset:
    """The sequences of one .bin/.idx pair."""

    def __init__(self, prefix: str | os.PathLike[str], *, thorough: bool = True) -> None:
        data, index = paths_of(prefix)
        self.prefix = data.with_suffix("")
        self._data, raw = _map(data), _map(index)
        self._sizes = (len(self._data), len(raw))
        self.dtype, sequences, entries = _header(index, raw)
        at = HEADER.size
        self.lengths: Array = raw[at : (at := at + 4 * sequences)].view("<i4")
        self.pointers: Array = raw[at : (at := at + 8 * sequences)].view("<i8")
        self.documents: Array = raw[at : (at := at + 8 * entries)].view("<i8")
        self.modes: Array | None = raw[at:].view("i1") if len(raw) > at else None
        if thorough:
            _check_sequences(self, index)
            _check_documents(self, index)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Array:
        return self.get(index)

    def get(self, index: int, offset: int = 0, count: int | None = None) -> Array:
        """`count` tokens of sequence `index` from `offset` on; without a count all that follow."""
        index = range(len(self))[index]
        length, size = int(self.lengths[index]), self.dtype.itemsize
        if not 0 <= offset <= length:
            raise IndexError(f"offset {offset} in a sequence of {length} tokens")
        end = length if count is None else min(length, offset + count)
        begin = int(self.pointers[index])
        return self._data[begin + offset * size : begin + end * size].view(self.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (str(self.prefix), self._sizes)


def _again(prefix: str, sizes: tuple[int, int]) -> IndexedDataset:
    """What was pickled has been checked; that it is still the same is known from the sizes."""
    found = IndexedDataset(prefix, thorough=False)
    if found._sizes != sizes:
        raise ValueError(f"{prefix}.bin and .idx have {found._sizes} bytes, not the {sizes} of when they were pickled: load them anew")
    return found


def _map(path: Path) -> Array:
    try:
        if path.stat().st_size == 0:  # which cannot be mapped
            return np.zeros(0, np.uint8)
        return np.asarray(np.memmap(path, np.uint8, mode="r"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise ValueError(f"{path}: no such file: an indexed data set is <prefix>.bin and <prefix>.idx") from error


def _header(path: Path, raw: Array) -> tuple[np.dtype[Any], int, int]:
    if len(raw) < HEADER.size:
        raise ValueError(f"{path} is cut short: {len(raw)} bytes, not even the {HEADER.size} of the header")
    magic, version, code, sequences, entries = HEADER.unpack(raw[: HEADER.size].tobytes())
    if magic != MAGIC:
        raise ValueError(f"{path} is not an index of Megatron's: it begins with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise ValueError(f"{path} has version {version} of the format; version {VERSION} can be read")
    if code not in DTYPES:
        raise ValueError(f"{path} has the unknown dtype code {code}; known are {min(DTYPES)} to {max(DTYPES)}")
    expected = HEADER.size + 12 * sequences + 8 * entries
    if len(raw) not in (expected, expected + sequences):  # with a mode for each sequence
        raise ValueError(f"{path} has {len(raw)} bytes, its header tells of {expected}: cut short or garbled")
    return DTYPES[code], sequences, entries


def _check_sequences(found: IndexedDataset, path: Path) -> None:
    size, item = found._sizes[0], found.dtype.itemsize
    for begin in range(0, len(found), _AT_ONCE):
        lengths = found.lengths[begin : begin + _AT_ONCE].astype(np.int64)
        pointers = found.pointers[begin : begin + _AT_ONCE]
        # Subtracted, not added: a garbled pointer near 2**63 must not wrap around to a valid one.
        wrong = (lengths < 0) | (pointers < 0) | (pointers > size)
        wrong |= lengths * item > size - np.where(wrong, size, pointers)
        if wrong.any():
            at = int(np.argmax(wrong))
            what = f"sequence {begin + at} has {lengths[at]} tokens at byte {pointers[at]}"
            raise ValueError(f"{path}: {what}, but {found.prefix}.bin has {size} bytes: cut short or garbled")


def _check_documents(found: IndexedDataset, path: Path) -> None:
    entries = found.documents
    ends = (int(entries[0]), int(entries[-1])) if len(entries) else None
    if ends != (0, len(found)):
        raise ValueError(f"{path}: documents begin and end at {ends}, not at {(0, len(found))}: garbled")
    for begin in range(0, len(entries), _AT_ONCE):
        if (np.diff(entries[begin : begin + _AT_ONCE + 1]) < 0).any():
            raise ValueError(f"{path}: documents are not in order: garbled")
