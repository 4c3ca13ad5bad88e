"""Training samples of equal length over a stream of tokens.

Seam: `TokenWindows(tokens, sequence_length)`, a map-style data set. All sequences are one stream, in order; sample i has the tokens
[i*L, (i+1)*L] of it: `input_ids` without the last, `labels` without the first, both int64. So each token up to the last whole window is
read exactly once; what is left of the stream, less than a window, is not. Shuffling is the sampler's. Finding a sample is a binary search
over the ends of the sequences: 8 bytes of memory for each.

States: none after it is made: any worker may read it, forked or spawned (a pickled one maps its files again). Failures: an index out of
range is an `IndexError`; tokens that are not whole numbers are a `ValueError` when it is made.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from lightning_gemini.datasets.settings import require, whole
from lightning_gemini.datasets.store import Array, TokenStore


class TokenWindows(Dataset[dict[str, torch.Tensor]]):
    """Samples of `sequence_length` tokens: `input_ids` and `labels`, int64, of that shape each. See the module's docstring."""

    def __init__(self, tokens: TokenStore, sequence_length: int) -> None:
        whole("sequence_length", sequence_length, 1)
        require(tokens.dtype.kind in "iu", "dtype", tokens.dtype.name, "training samples are made of whole numbers")
        self.tokens, self.sequence_length = tokens, sequence_length
        self._ends = np.cumsum(tokens.lengths, dtype=np.int64)

    @property
    def token_count(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __len__(self) -> int:
        return max(0, self.token_count - 1) // self.sequence_length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        index = range(len(self))[index]
        window = torch.from_numpy(self._read(index * self.sequence_length, self.sequence_length + 1))
        # Two tensors of their own: a change of one in place must not change the other.
        return {"input_ids": window[:-1].clone(), "labels": window[1:].clone()}

    def _read(self, begin: int, count: int) -> Array:
        found = np.empty(count, np.int64)
        at = int(np.searchsorted(self._ends, begin, side="right"))
        offset = begin - (int(self._ends[at - 1]) if at else 0)
        filled = 0
        while filled < count:
            part = self.tokens.get(at, offset, count - filled)
            found[filled : filled + len(part)] = part
            filled, at, offset = filled + len(part), at + 1, 0
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenWindows, (self.tokens, self.sequence_length)
