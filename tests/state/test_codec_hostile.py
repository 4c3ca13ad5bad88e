"""The codec's reader against bytes that nobody encoded: one kind of error, no memory beyond its share, nothing run."""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import pathlib
import pickle
import struct
import sys
import tracemalloc
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_gemini.state import codec
from lightning_gemini.state.codec_types import KNOWN, Code


def blob(
    codes: Sequence[int], leaves: list[Any] | bytes = b"\x90", raw: bytes = b"", *, pickled: bytes = b"", odd: Sequence[int] = (0,)
) -> bytes:
    """Well formed on the outside."""
    words = array("Q", [*map(int, codes), *odd]).tobytes()
    packed = leaves if isinstance(leaves, bytes) else msgspec.msgpack.encode(leaves)
    return struct.pack("<4s4Q", b"LGS1", len(words), len(packed), len(raw), len(pickled)) + words + packed + raw + pickled


def known(name: str, *leaves: Any) -> bytes:
    return blob([Code.KNOWN, 2 * len(leaves) + 1], [name, *leaves])


class Bomb:
    """Leaves a trace where it is unpickled."""

    def __reduce__(self) -> Any:
        return (sys.setrecursionlimit, (12345,))


HUGE = 1 << 62
FOR_NOTHING = {"OrderedDict", "Counter", "torch.Size", "Fraction", "complex", "timedelta", "Decimal"}
"""Types that need no parts."""
BAD: dict[str, bytes] = {
    "nothing": b"",
    "another format": pickle.dumps({"a": 1}),
    "another version": b"LGS2" + blob([Code.LIST, 1])[4:],
    "cut off": codec.encode([1, b"abc"], {}, foreign=True)[:-1],
    "too long": codec.encode([1, b"abc"], {}, foreign=True) + b"x",
    "no codes": blob([]),
    "not even a count": struct.pack("<4s4Q", b"LGS1", 0, 1, 0, 0) + b"\x90",
    "unknown code": blob([99]),
    "more leaves than there are": blob([Code.LIST, HUGE + 1], [1]),
    "more values than there are": blob([Code.LIST, HUGE], [1]),
    "more bytes than there are": blob([Code.BYTES, HUGE], raw=b"abc"),
    "leaves that are not used": blob([Code.LIST, 3], [1, 2]),
    "bytes that are not used": blob([Code.BYTES, 1], raw=b"ab"),
    "codes that are not used": blob([Code.LIST, 1, Code.LIST, 1]),
    "leaves in leaves": blob([Code.LEAF], [[1]]),
    "a huge array of leaves": blob([Code.LIST, 1], b"\xdd\x7f\xff\xff\xff"),
    "a huge string": blob([Code.LEAF], b"\x91\xdb\x7f\xff\xff\xff"),
    "a list as a key": blob([Code.DICT, 2, Code.LIST, 1, 3], [1]),
    "keys without values": blob([Code.DICT, 5, 3], [1, 2, 3]),
    "a reference to nothing": blob([Code.REFERENCE, 0]),
    "a reference to what is under way": blob([Code.TUPLE, 2, Code.REFERENCE, 0]),
    "a reference far away": blob([Code.REFERENCE, HUGE]),
    "an unknown name": blob([Code.ANCHOR], ["os.system"]),
    "an unknown constant": blob([Code.CONSTANT], ["eval"]),
    "an unknown type": known("os.system", "true"),
    "a member of what is no enumeration": known("enum", "os", "system", "__call__"),
    "a member of a module that is not loaded": known("enum", "antigravity", "a", "b"),
    "an object without a pickle": blob([Code.UNKNOWN]),
    "a huge tensor": blob([Code.TENSOR, 0, 2, 1 << 32, 1 << 32], ["float32"]),
    "a tensor of many dimensions": blob([Code.TENSOR, 0, 65] + [1] * 65, ["uint8"], b"x"),
    "a tensor of no dtype": blob([Code.TENSOR, 0, 0], ["float128"]),
    "dimensions in no order": blob([Code.TENSOR, 8, 2, 1, 1, 0, 0], ["uint8"], b"x"),
    "integers with gradients": blob([Code.TENSOR, 1, 0], ["uint8"], b"x"),
    "a huge array": blob([Code.KNOWN, 8, Code.LEAF, Code.LEAF, Code.BYTES, 1, Code.LEAF], ["ndarray", "|u1", "C", HUGE], b"x"),
    "an array of objects": blob([Code.KNOWN, 8, Code.LEAF, Code.LEAF, Code.BYTES, 8, Code.LEAF], ["ndarray", "|O", "C", 1], bytes(8)),
    "an array of open shape": blob([Code.KNOWN, 8, Code.LEAF, Code.LEAF, Code.BYTES, 1, Code.LEAF], ["ndarray", "|u1", "C", -1], b"x"),
    "bytes by their number": known("bytearray", 1 << 33),
    "an odd leaf that is not there": blob([Code.LEAF], [True], b"x", odd=(7, 1, 1)),
    "an odd leaf without bytes": blob([Code.LEAF], [True], b"x", odd=(0, 9, 1)),
    "more odd leaves than there are": blob([Code.LEAF], [True], b"x", odd=(HUGE,)),
    "nested without end": blob([Code.LIST, 2] * 100_000 + [Code.LIST, 1]),
    "a pickle": blob([Code.UNKNOWN], pickled=pickle.dumps([Bomb()])),
    "a pickle beside the rest": blob([Code.LIST, 1], pickled=pickle.dumps([Bomb()])),
    **{f"{name} of nothing": known(name) for name in KNOWN if name not in FOR_NOTHING},
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_bad_bytes_are_one_kind_of_error(data: bytes) -> None:
    before = sys.getrecursionlimit()
    with pytest.raises(ValueError, match="the rank-local state cannot be read"):
        codec.decode(data, {}, foreign=True)
    assert sys.getrecursionlimit() == before


def read(data: bytes) -> int:
    """Try to; the peak of the memory taken, of which there may not be much."""
    tracemalloc.start()
    try:
        codec.decode(data, {}, foreign=True)
    except ValueError as error:
        assert "the rank-local state cannot be read" in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


SMALL = 100_000
FACTOR = 64
EXPENSIVE: dict[str, Callable[[int], bytes]] = {
    "empty lists": lambda n: blob([Code.LIST, 2 * n, *[Code.LIST, 1] * n]),
    "empty sets": lambda n: blob([Code.LIST, 2 * n, *[Code.SET, 1] * n]),
    "empty dicts": lambda n: blob([Code.LIST, 2 * n, *[Code.DICT, 1, 1] * n]),
    "dicts of one": lambda n: blob([Code.LIST, 2 * n, *[Code.DICT, 3, 3] * n], [1] * (2 * n)),
    "deques": lambda n: blob([Code.LIST, 2 * n, *[Code.KNOWN, 3] * n], ["deque", None] * n),
    "ordered dicts": lambda n: blob([Code.LIST, 2 * n, *[Code.KNOWN, 5] * n], ["OrderedDict", 1, 1] * n),
    "tensors": lambda n: blob([Code.LIST, 2 * n, *[Code.TENSOR, 0, 0] * n], ["bool"] * n, bytes(n)),
    "a set of numbers": lambda n: blob([Code.SET, 2 * n + 1], list(range(n))),
    "short strings": lambda n: blob([Code.LIST, 2 * n + 1], [f"{i % 90 + 10}" for i in range(n)]),
    "copies of one array": lambda n: blob(
        [Code.LIST, 2 * n + 2, Code.KNOWN, 2, Code.BYTES, 10 * n, *[Code.KNOWN, 2, Code.REFERENCE, 1] * n],
        ["bytearray"] * (n + 1),
        bytes(10 * n),
    ),
}


@pytest.mark.parametrize("make", EXPENSIVE.values(), ids=EXPENSIVE)
def test_little_never_becomes_much(make: Callable[[int], bytes]) -> None:
    data = make(2000)
    assert read(data) < SMALL + FACTOR * len(data)


WORDS = st.sampled_from([*Code, 1, 2, 3, 4, 5, 6, 7]) | st.integers(0, 40) | st.integers(0, 2**64 - 1)
NAMES = st.sampled_from([*KNOWN, "float32", "int64", "C", "<f4", "<U3", "cuda:1", "torch.mean"])
ANY_LEAF = NAMES | st.integers(-(2**63), 2**64 - 1) | st.none() | st.booleans() | st.floats() | st.text()


@settings(deadline=None, max_examples=300)
@given(st.lists(WORDS, max_size=60), st.lists(ANY_LEAF, max_size=20), st.binary())
def test_any_structure_is_harmless(codes: list[int], leaves: list[Any], raw: bytes) -> None:
    data = blob(codes, leaves, raw)
    assert read(data) < SMALL + FACTOR * len(data)


@settings(deadline=None, max_examples=300)
@given(st.binary() | st.binary().map(lambda rest: b"LGS1" + rest))
def test_any_bytes_are_harmless(data: bytes) -> None:
    assert read(data) < SMALL + FACTOR * len(data)


ORIGINALS = [
    codec.encode(value, {}, foreign=True)
    for value in (
        {"a": [1, (2.5, None, True)], 3: {1, "x"}, "big": 2**70, "odd": "\ud800", "b": b"bytes", "c": frozenset({b"x", (1, 2)})},
        [collections.deque([1, [2]], 3), collections.OrderedDict(a=[1]), collections.Counter("aab"), collections.defaultdict(list, a=1)],
        [datetime.datetime(2024, 1, 2, tzinfo=datetime.timezone.utc), fractions.Fraction(1, 3), decimal.Decimal("1.5"), pathlib.Path("/a")],
        [np.arange(6.0).reshape(2, 3), np.float32(1), np.array(["ab"]), range(3), slice(1, 2), 1j, bytearray(b"x"), Code.LIST],
        [torch.ones(2, 3), torch.ones(1, 2, 2, 2).to(memory_format=torch.channels_last), nn.Parameter(torch.ones(1)), torch.device("cpu")],
    )
]


@settings(deadline=None, max_examples=500)
@given(st.data())
def test_any_change_is_harmless(data: st.DataObject) -> None:
    original = bytearray(data.draw(st.sampled_from(ORIGINALS)))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(original) - 1))
        original[place] = data.draw(st.sampled_from([0, 1, 2, 3, 7, 8, 9, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))
    assert read(bytes(original)) < SMALL + FACTOR * len(original)
