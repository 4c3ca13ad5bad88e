"""The codec's way back, from rows that may come from a stranger.

Seam: `Reader(codes, leaves, raw, unknown, anchors, device).value()`. It makes plain containers, tensors, and what `codec_types` lists;
nothing is looked up by a name from the bytes but in those tables and in `anchors`. Every length is compared with what is left of its row
before anything of that length is made, and all rows must be used up at the end.

Failure: some exception, of any kind; `codec.decode` makes one kind of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from lightning_gemini.state import codec_tensor
from lightning_gemini.state.codec_types import CONSTANTS, KNOWN, MAX_DEPTH, Code, Leaf


class Reader:
    """One walk."""

    def __init__(
        self, codes: list[int], leaves: list[Leaf], raw: bytearray, unknown: list[Any], anchors: Mapping[str, Any], device: torch.device
    ) -> None:
        self._codes, self._leaves, self._raw, self._unknown, self._anchors, self._device = codes, leaves, raw, unknown, anchors, device
        self._code = self._leaf = self._byte = self._object = 0
        """How far each row has been read."""
        self._values: list[Any] = []
        self._depth = 0

    def value(self) -> Any:
        """The whole. Raises whatever it meets."""
        self._odd_leaves()
        found = self._get()
        used = self._code, self._leaf, self._byte, self._object
        if used != (len(self._codes), len(self._leaves), len(self._raw), len(self._unknown)):
            raise ValueError("it has more content than structure")
        return found

    def _odd_leaves(self) -> None:
        """Integers and strings that MessagePack does not have: at the end of the codes (place, bytes) of each, and how many there are; at
        the end of raw their content."""
        count = self._codes.pop()
        if not count:
            return
        if 2 * count > len(self._codes):
            raise ValueError("it ends too early")
        table, self._codes = self._codes[-2 * count :], self._codes[: -2 * count]
        start = first = len(self._raw) - sum(table[1::2])
        if start < 0:
            raise ValueError("it ends too early")
        for place, size in zip(table[::2], table[1::2], strict=True):
            data, start = self._raw[start : start + size], start + size
            is_int = self._leaves[place] is True
            self._leaves[place] = int.from_bytes(data, "little", signed=True) if is_int else data.decode("utf-8", "surrogatepass")
        del self._raw[first:]

    def _get(self) -> Any:
        return _READERS[self._next_code()](self)

    def _next_code(self) -> int:
        self._code += 1
        return self._codes[self._code - 1]

    def _next_leaf(self) -> Leaf:
        self._leaf += 1
        return self._leaves[self._leaf - 1]

    def _skip(self, size: int) -> int:
        """Where the next `size` bytes of raw begin."""
        start = self._byte
        self._byte += size
        if self._byte > len(self._raw):
            raise ValueError("it ends too early")
        return start

    def _kept(self, value: Any) -> Any:
        self._values.append(value)
        return value

    def _items(self) -> list[Any]:
        size, leaves = divmod(self._next_code(), 2)
        if leaves:
            start = self._leaf
            self._leaf += size
            if self._leaf > len(self._leaves):
                raise ValueError("it ends too early")
            return self._leaves[start : self._leaf]
        if size > len(self._codes) - self._code:
            raise ValueError("it ends too early")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH}")
        found = [self._get() for _ in range(size)]
        self._depth -= 1
        return found

    def _list(self) -> list[Any]:
        found: list[Any] = self._kept([])
        found += self._items()
        return found

    def _dict(self) -> dict[Any, Any]:
        found: dict[Any, Any] = self._kept({})
        keys = self._items()
        found.update(zip(keys, self._items(), strict=True))
        return found

    def _set(self) -> set[Any]:
        found: set[Any] = self._kept(set())
        found.update(self._items())
        return found

    def _tuple(self) -> tuple[Any, ...]:
        return self._kept(tuple(self._items()))  # type: ignore[no-any-return]

    def _frozenset(self) -> frozenset[Any]:
        return self._kept(frozenset(self._items()))  # type: ignore[no-any-return]

    def _bytes(self) -> bytes:
        size = self._next_code()
        start = self._skip(size)
        return bytes(self._raw[start : start + size])

    def _tensor(self) -> torch.Tensor:
        layout = codec_tensor.Layout.read(str(self._next_leaf()), self._next_code)
        return self._kept(layout.build(self._raw, self._skip(layout.nbytes), self._device))  # type: ignore[no-any-return]

    def _known(self) -> Any:
        known = KNOWN[str(self._next_leaf())]
        return self._kept(known.build(self._items()))

    def _reference(self) -> Any:
        return self._values[self._next_code()]

    def _anchor(self) -> Any:
        name = str(self._next_leaf())
        if name not in self._anchors:
            raise ValueError(f"it refers to {name!r}, which this process does not have")
        return self._anchors[name]

    def _constant(self) -> Any:
        return CONSTANTS[str(self._next_leaf())]

    def _pickled(self) -> Any:
        self._object += 1
        return self._kept(self._unknown[self._object - 1])


_READERS: dict[int, Callable[[Reader], Any]] = {
    Code.LEAF: Reader._next_leaf,
    Code.LIST: Reader._list,
    Code.TUPLE: Reader._tuple,
    Code.SET: Reader._set,
    Code.FROZENSET: Reader._frozenset,
    Code.DICT: Reader._dict,
    Code.BYTES: Reader._bytes,
    Code.TENSOR: Reader._tensor,
    Code.KNOWN: Reader._known,
    Code.REFERENCE: Reader._reference,
    Code.ANCHOR: Reader._anchor,
    Code.CONSTANT: Reader._constant,
    Code.UNKNOWN: Reader._pickled,
}
