"""The codec's walk over a value: structure, leaves and raw content, each into its own row.

Seam: `Writer(names).put(value)`; then `codes`, `leaves`, `raw` and `unknown`. `names` is asked only for objects of types that the codec
does not know. A walk costs per container, not per leaf: a list of a thousand numbers is one test of their types and one `extend`.

Values get numbers, by which they are referred to when they are met again: containers that can hold themselves before their content, all
others after it. Failure: `TooDeep`, for what is nested too deep and for what contains itself in a way that cannot be built again.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from lightning_gemini.state import codec_tensor
from lightning_gemini.state.codec_types import CONSTANT_NAMES, ENUM, KNOWN_BY_TYPE, LEAVES, MAX_DEPTH, Code, Known, Leaf

_LEAF, _LIST, _TUPLE, _SET, _FROZENSET, _DICT = map(int, (Code.LEAF, Code.LIST, Code.TUPLE, Code.SET, Code.FROZENSET, Code.DICT))
_BYTES, _TENSOR, _KNOWN, _REFERENCE = map(int, (Code.BYTES, Code.TENSOR, Code.KNOWN, Code.REFERENCE))
_ANCHOR, _CONSTANT, _UNKNOWN = map(int, (Code.ANCHOR, Code.CONSTANT, Code.UNKNOWN))


class TooDeep(Exception):
    """`value` lies deeper than `MAX_DEPTH`."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Writer:
    """One walk."""

    def __init__(self, names: Mapping[int, str]) -> None:
        self.codes: list[int] = []
        self.leaves: list[Leaf] = []
        self.raw: list[Any] = []
        """Buffers."""
        self.unknown: list[Any] = []
        """What only pickle can store."""
        self._names = names
        self._numbers: dict[int, int] = {}
        self._count = 0
        self._kept: list[Any] = []
        """Parts made on the way: while they live, nothing else has their `id`."""
        self._depth = 0

    def put(self, value: Any) -> None:
        """Write one value."""
        kind = type(value)
        if kind in LEAVES:
            self.codes.append(_LEAF)
            self.leaves.append(value)
            return
        number = self._numbers.get(id(value))
        if number is not None:
            self.codes += (_REFERENCE, number)
        elif kind in _WRITERS:
            _WRITERS[kind](self, value)
        elif kind in KNOWN_BY_TYPE:
            self._known(value, KNOWN_BY_TYPE[kind])
        else:
            self._other(value)

    def _number(self, value: Any) -> None:
        self._numbers[id(value)] = self._count
        self._count += 1

    def _items(self, items: Collection[Any]) -> None:
        if LEAVES.issuperset(map(type, items)):
            self.codes.append(2 * len(items) + 1)
            self.leaves += items
            return
        self.codes.append(2 * len(items))
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise TooDeep(items)
        for item in items:
            self.put(item)
        self._depth -= 1

    def _list(self, value: list[Any]) -> None:
        self._number(value)
        self.codes.append(_LIST)
        self._items(value)

    def _dict(self, value: dict[Any, Any]) -> None:
        self._number(value)
        self.codes.append(_DICT)
        self._items(value)
        self._items(value.values())

    def _set(self, value: set[Any]) -> None:
        self._number(value)
        self.codes.append(_SET)
        self._items(value)

    def _tuple(self, value: tuple[Any, ...]) -> None:
        self.codes.append(_TUPLE)
        self._items(value)
        self._number(value)

    def _frozenset(self, value: frozenset[Any]) -> None:
        self.codes.append(_FROZENSET)
        self._items(value)
        self._number(value)

    def _bytes(self, value: bytes) -> None:
        self.codes += (_BYTES, len(value))
        self.raw.append(value)

    def _tensor(self, value: torch.Tensor) -> None:
        if not codec_tensor.is_dense(value):
            self._other(value)
            return
        self.codes.append(_TENSOR)
        dtype, words, data = codec_tensor.take_apart(value)
        self.leaves.append(dtype)
        self.codes += words
        self.raw.append(data)
        self._number(value)

    def _known(self, value: Any, known: Known) -> None:
        parts = known.parts(value)
        if parts is None:
            self._pickled(value)
            return
        self._kept.append(parts)
        self.codes.append(_KNOWN)
        self.leaves.append(known.name)
        self._items(parts)
        self._number(value)

    def _other(self, value: Any) -> None:
        name, constant = self._names.get(id(value)), CONSTANT_NAMES.get(id(value))
        if name is not None or constant is not None:
            self.codes.append(_CONSTANT if name is None else _ANCHOR)
            self.leaves.append(name or constant)
        elif isinstance(value, enum.Enum):
            self._known(value, ENUM)
        else:
            self._pickled(value)

    def _pickled(self, value: Any) -> None:
        self.codes.append(_UNKNOWN)
        self.unknown.append(value)
        self._number(value)


_WRITERS: dict[type, Callable[[Writer, Any], None]] = {
    list: Writer._list,
    tuple: Writer._tuple,
    dict: Writer._dict,
    set: Writer._set,
    frozenset: Writer._frozenset,
    bytes: Writer._bytes,
    torch.Tensor: Writer._tensor,
    torch.nn.Parameter: Writer._tensor,
}
