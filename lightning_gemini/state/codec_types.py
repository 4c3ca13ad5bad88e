"""What the codec knows by name: values of which there is one, and types that are built from simpler parts.

Seam: `CONSTANTS` (name -> value) and `KNOWN` (name -> how to take apart and to build). A reader builds only what is listed here, whatever
the bytes say. A builder may raise anything for parts that are wrong. It copies none of its parts but `bytes`, which cannot be referred to:
so nobody can make much of little by referring to the same part many times.

Members of enumerations go by module, class and name. They are looked up among the modules that the reader has loaded: nothing is imported,
and no class is called.
"""

from __future__ import annotations

import builtins
import collections
import datetime
import decimal
import enum
import fractions
import pathlib
import re
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from lightning_gemini.state.codec_tensor import DTYPES

MAX_DEPTH = 100
"""Containers within containers."""
Leaf = None | bool | int | float | str
LEAVES = frozenset({type(None), bool, int, float, str})


class Code(enum.IntEnum):
    """Words of structure. `items` is a word, 2 n + 1 where n leaves follow in their row, or 2 n where n values follow in this one."""

    LEAF = 0
    """The next leaf."""
    LIST = 1
    """Items. As TUPLE, SET, FROZENSET."""
    TUPLE = 2
    SET = 3
    FROZENSET = 4
    DICT = 5
    """Items: the keys. Items: the values."""
    BYTES = 6
    """The size in raw. Not numbered: cannot be referred to."""
    TENSOR = 7
    """The next leaf is its dtype; see `codec_tensor`."""
    KNOWN = 8
    """The next leaf names the type. Items: the parts."""
    REFERENCE = 9
    """The number of a value that was there before."""
    ANCHOR = 10
    """The next leaf names an object of the process."""
    CONSTANT = 11
    """The next leaf names it."""
    UNKNOWN = 12
    """The next of the pickle's objects."""


@dataclass(frozen=True, slots=True)
class Known:
    """A type that is stored by its parts."""

    name: str
    parts: Callable[[Any], Collection[Any] | None]
    """None for one that cannot be taken apart."""
    build: Callable[[list[Any]], Any]


# ---- values of which there is one

_BUILTINS = ("bool", "int", "float", "complex", "str", "bytes", "list", "tuple", "dict", "set", "Ellipsis", "min", "max", "sum")
_TORCH = ("mean", "min", "max", "sum", "strided", "contiguous_format", "channels_last", "channels_last_3d", "preserve_format")
CONSTANTS: dict[str, Any] = {
    **{name: getattr(builtins, name) for name in _BUILTINS},
    **{f"torch.{name}": getattr(torch, name) for name in _TORCH},
    **{f"torch.{name}": dtype for name, dtype in DTYPES.items()},
}
CONSTANT_NAMES = {id(value): name for name, value in CONSTANTS.items()}


# ---- enumerations


def _enum_parts(member: enum.Enum) -> tuple[str, ...] | None:
    parts = type(member).__module__, type(member).__qualname__, member.name
    try:
        return parts if _member(*parts) is member else None
    except (KeyError, TypeError, AttributeError):  # a class within a function, a combination of flags
        return None


def _member(module: str, path: str, name: str) -> enum.Enum:
    found: Any = sys.modules[module]
    for step in path.split("."):
        found = vars(found)[step]
    if not isinstance(found, enum.EnumMeta):
        raise TypeError(f"{module}.{path} is no enumeration")
    return found.__members__[name]


ENUM = Known("enum", _enum_parts, lambda parts: _member(*parts))


# ---- containers that are dicts: keys, then values


def _flat(value: dict[Any, Any]) -> tuple[Any, ...]:
    return tuple(chain(value, value.values()))


def _pairs(parts: list[Any]) -> Any:
    return zip(parts[: len(parts) // 2], parts[len(parts) // 2 :], strict=True)


# ---- arrays

_DTYPE = re.compile(r"[<>|][biufcSU]\d+|[<>][mM]8(\[\w+\])?")
"""As `numpy.dtype.str` has it: no objects, no records."""


def _array_parts(value: Any) -> tuple[Any, ...] | None:
    order = "F" if value.flags.f_contiguous and not value.flags.c_contiguous else "C"
    return (value.dtype.str, order, value.tobytes(order), *value.shape) if _DTYPE.fullmatch(value.dtype.str) else None


def _array(parts: list[Any]) -> Any:
    dtype, order, data, *shape = parts
    if not _DTYPE.fullmatch(dtype):
        raise ValueError(f"an array of {dtype!r}")
    if -1 in shape:
        raise ValueError(f"an array of shape {shape}")
    return np.frombuffer(_bytes([data]), np.dtype(dtype)).reshape(shape, order=order).copy(order)


def _bytes(parts: list[Any]) -> bytes:
    (data,) = parts
    if type(data) is not bytes:
        raise TypeError(f"{type(data).__name__} where bytes must be")
    return data


_SCALAR = Known("numpy scalar", lambda value: _array_parts(np.asarray(value)), lambda parts: _array(parts)[()])


# ---- times


def _time_parts(v: datetime.datetime) -> tuple[Any, ...]:
    return v.fold, v.year, v.month, v.day, v.hour, v.minute, v.second, v.microsecond, v.tzinfo


def _interval(value: Any) -> tuple[Any, ...]:
    return value.start, value.stop, value.step


def _path(parts: list[Any]) -> str:
    (text,) = parts
    if type(text) is not str:
        raise TypeError(f"{type(text).__name__} where a path must be")
    return text


KNOWN_BY_TYPE: dict[type, Known] = {
    **dict.fromkeys(set(np.sctypeDict.values()), _SCALAR),
    np.ndarray: Known("ndarray", _array_parts, _array),
    bytearray: Known("bytearray", lambda v: (bytes(v),), lambda parts: bytearray(_bytes(parts))),
    complex: Known("complex", lambda v: (v.real, v.imag), lambda parts: complex(*parts)),
    range: Known("range", _interval, lambda parts: range(*parts)),
    slice: Known("slice", _interval, lambda parts: slice(*parts)),
    collections.OrderedDict: Known("OrderedDict", _flat, lambda parts: collections.OrderedDict(_pairs(parts))),
    collections.Counter: Known("Counter", _flat, lambda parts: collections.Counter(dict(_pairs(parts)))),
    collections.defaultdict: Known(
        "defaultdict", lambda v: (v.default_factory, *_flat(v)), lambda parts: collections.defaultdict(parts[0], _pairs(parts[1:]))
    ),
    collections.deque: Known("deque", lambda v: (v.maxlen, *v), lambda parts: collections.deque(parts[1:], parts[0])),
    datetime.date: Known("date", lambda v: (v.year, v.month, v.day), lambda parts: datetime.date(*parts)),
    datetime.datetime: Known("datetime", _time_parts, lambda parts: datetime.datetime(*parts[1:], fold=parts[0])),
    datetime.timedelta: Known("timedelta", lambda v: (v.days, v.seconds, v.microseconds), lambda parts: datetime.timedelta(*parts)),
    datetime.timezone: Known("timezone", lambda v: v.__getinitargs__(), lambda parts: datetime.timezone(*parts)),
    decimal.Decimal: Known("Decimal", lambda v: (str(v),), lambda parts: decimal.Decimal(*parts)),
    fractions.Fraction: Known("Fraction", lambda v: (v.numerator, v.denominator), lambda parts: fractions.Fraction(*parts)),
    pathlib.PosixPath: Known("PosixPath", lambda v: (str(v),), lambda parts: pathlib.PosixPath(_path(parts))),
    pathlib.PurePosixPath: Known("PurePosixPath", lambda v: (str(v),), lambda parts: pathlib.PurePosixPath(_path(parts))),
    torch.Size: Known("torch.Size", tuple, torch.Size),
    torch.device: Known("torch.device", lambda v: (str(v),), lambda parts: torch.device(*parts)),
}
KNOWN: dict[str, Known] = {known.name: known for known in (ENUM, *KNOWN_BY_TYPE.values())}
