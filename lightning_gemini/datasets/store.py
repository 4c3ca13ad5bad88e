"""What a set of tokenised documents is to those who read it, and the one that is kept in memory.

Seam: `TokenStore` is read by `windows`; `indexed.IndexedDataset` is the one on disk, `TokensInMemory` the one for a full disk. Both are
immutable. Failure: `in_memory` raises `TooLarge` as soon as the tokens pass the limit, before they are all made.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class TooLarge(Exception):
    """More tokens than may be held in memory."""


class TokenStore(Protocol):
    """Sequences of tokens, in order."""

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def lengths(self) -> Array:
        """Tokens of each sequence."""

    def get(self, index: int, offset: int = 0, count: int | None = None) -> Array:
        """`count` tokens of sequence `index` from `offset` on (all that follow, without a count), not copied, not writable."""

    def __len__(self) -> int: ...


class TokensInMemory:
    """One array, and where each sequence ends in it."""

    def __init__(self, tokens: Array, lengths: Array) -> None:
        self._tokens, self.lengths = tokens, lengths
        self._tokens.flags.writeable = False
        self._ends = np.cumsum(lengths, dtype=np.int64)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._tokens.dtype

    def __len__(self) -> int:
        return len(self.lengths)

    def get(self, index: int, offset: int = 0, count: int | None = None) -> Array:
        index = range(len(self))[index]
        end = int(self._ends[index])
        begin = end - int(self.lengths[index]) + offset
        return self._tokens[begin : end if count is None else min(end, begin + count)]


def in_memory(documents: Iterable[Array], dtype: np.dtype[Any], limit: int) -> TokensInMemory:
    """Collect `documents`, at most `limit` bytes of them."""
    tokens, lengths = bytearray(), []
    for document in documents:
        if len(tokens) + len(document) * dtype.itemsize > limit:
            raise TooLarge
        tokens += np.asarray(document, dtype).tobytes()
        lengths.append(len(document))
    return TokensInMemory(np.frombuffer(tokens, dtype), np.array(lengths, np.int32))
