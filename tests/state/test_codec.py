"""The codec of the rank-local state: what goes in comes out, of the same types; what is not known is named."""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import fractions
import math
import pathlib
import random
import struct
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_gemini.state import codec
from lightning_gemini.state.codec_tensor import DTYPES
from lightning_gemini.state.codec_types import MAX_DEPTH
from lightning_gemini.state.local import Kind


class Color(enum.Enum):
    RED = "red"


class Plain:
    """Of a user."""

    class Shade(enum.IntFlag):
        DARK = 1
        WARM = 2

    def __init__(self, held: Any = None) -> None:
        self.held = held


def there_and_back(value: Any, *, foreign: bool = True) -> Any:
    return codec.decode(codec.encode(value, {}, foreign=foreign), {}, foreign=foreign)


def bits(value: torch.Tensor) -> bytes:
    own = value.detach().resolve_conj().resolve_neg().contiguous()
    return own.as_strided((own.numel(),), (1,)).view(torch.uint8).numpy().tobytes()


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, and of the same types in the same order all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        kind = a.dtype == b.dtype and a.shape == b.shape and a.requires_grad == b.requires_grad
        return kind and bits(a) == bits(b)
    if isinstance(a, (np.ndarray, np.generic)):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, float):
        return struct.pack("<d", a) == struct.pack("<d", b)
    if isinstance(a, complex):
        return same((a.real, a.imag), (b.real, b.imag))
    if isinstance(a, dict):
        return getattr(a, "default_factory", None) == getattr(b, "default_factory", None) and same(list(a.items()), list(b.items()))
    if isinstance(a, (list, tuple, collections.deque)):
        return len(a) == len(b) and all(map(same, a, b)) and getattr(a, "maxlen", 0) == getattr(b, "maxlen", 0)
    return bool(a == b) and (isinstance(a, (set, frozenset)) or repr(a) == repr(b))


# ---- what comes back

UTC = datetime.timezone.utc
VALUES: dict[str, Any] = {
    "none": None,
    "booleans are no integers": [True, 1, False, 0, 1.0],
    "integers": [0, -1, 2**63 - 1, -(2**63), 2**64 - 1],
    "integers beyond 64 bits": {"state": 2**127 + 5, "inc": [-(2**63) - 1, 2**64, -(10**400), "x", True, False]},
    "floats": [0.0, -0.0, math.inf, -math.inf, 5e-324, 1e308],
    "nan": math.nan,
    "complex": [1j, complex(-0.0, math.inf)],
    "strings": ["", "a", "é", "\0", "😀", "x" * 70000],
    "surrogates": ["\ud800", "a\udfffé", "\ud83d\ude00", 2**70],
    "bytes": [b"", b"\0", bytes(70000), bytearray(b"ab"), bytearray()],
    "containers": [[], (), {}, set(), frozenset(), [[]], ((),), {"a": {}}, [1, (2, [3.0, {"x": None}])]],
    "sets": [{1, 2}, {"a", None}, frozenset({(1, 2), "a", frozenset({1})}), {b"a"}],
    "keys of all kinds": {1: 1, "1": 2, (1, "a"): 3, None: 4, 2.5: 5, b"x": 6, frozenset({1}): 7},
    "true and one as keys apart": [{True: "a"}, {1: "a"}],
    "the order of keys": {"b": [1], "a": 2, "c": (3,)},
    "other containers": [
        collections.deque([1, [2]], maxlen=5),
        collections.deque(),
        collections.OrderedDict(b=1, a=[2]),
        collections.Counter("abca"),
        collections.defaultdict(list, a=[1]),
        collections.defaultdict(None, {1: 2}),
    ],
    "times": [
        datetime.date(2024, 2, 29),
        datetime.datetime(2024, 1, 2, 3, 4, 5, 6),
        datetime.datetime(2024, 1, 2, tzinfo=UTC, fold=1),
        datetime.datetime(1, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=-3), "x")),
        datetime.timedelta(-1, 2, 3),
    ],
    "fractions": [fractions.Fraction(-1, 3), decimal.Decimal("1.10"), decimal.Decimal("-Infinity"), decimal.Decimal("1e99999")],
    "paths": [pathlib.Path("/a/b"), pathlib.PurePosixPath("c")],
    "intervals": [range(3), range(5, -5, -2), slice(None), slice(1, 2.5, [3])],
    "sizes and devices": [torch.Size([2, 3]), torch.Size([]), torch.device("cuda", 1), torch.device("cpu")],
    "constants": [int, list, ..., torch.mean, max, torch.bfloat16, torch.strided],
    "enumerations": [Color.RED, Plain.Shade.WARM, Kind.EXIT],
    "state of python's generator": random.Random(5).getstate(),
    "state of numpy's generator": np.random.default_rng(5).bit_generator.state,
    "state of numpy's older generator": np.random.RandomState(5).get_state(),
    "state of the Mersenne twister": np.random.Generator(np.random.MT19937(5)).bit_generator.state,
    "state of torch's generator": torch.Generator().manual_seed(5).get_state(),
    "numpy's numbers": [np.float64(1.5), np.float32(0.1), np.int8(-3), np.bool_(True), np.complex64(1j)],
    "numpy's other values": [np.str_("é"), np.bytes_(b"x"), np.datetime64("2024", "ns"), np.timedelta64(1, "D")],
    "arrays": [np.arange(6, dtype=">i4").reshape(2, 3), np.zeros((0, 3)), np.array(1.5), np.array(["a", "bc"]), np.arange(9.0)[::2]],
    "tensors": [torch.ones(2, 3), torch.tensor(1.5), torch.empty(0, 3), nn.Parameter(torch.ones(1)), torch.ones(2, requires_grad=True)],
    "views": [torch.arange(12).view(3, 4).t(), torch.arange(12)[::2], torch.ones(1).expand(3, 2), torch.tensor([1j]).conj().imag],
    "deep": eval("[" * MAX_DEPTH + "]" * MAX_DEPTH),
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("foreign", [False, True])
def test_what_goes_in_comes_out(value: Any, foreign: bool) -> None:
    assert same(there_and_back(value, foreign=foreign), value)


@pytest.mark.parametrize("name", DTYPES)
def test_tensors_of_every_dtype(name: str) -> None:
    size = DTYPES[name].itemsize
    data = torch.arange(6 * size, dtype=torch.uint8) % 2
    value = data.view(DTYPES[name]).view(2, 3)
    assert same(there_and_back(["x", value, value[0, 0]]), ["x", value, value[0, 0]])


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.binary() | st.complex_numbers()
KEYS = st.integers() | st.text() | st.none() | st.tuples(st.integers(), st.text()) | st.frozensets(st.integers())
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(KEYS, inner)
        | st.lists(inner).map(collections.deque)
        | st.dictionaries(KEYS, inner).map(collections.OrderedDict)
    ),
    max_leaves=30,
)


@settings(deadline=None)
@given(TREES)
def test_any_tree_comes_back(value: Any) -> None:
    assert same(there_and_back(value), value)


def test_the_order_of_dimensions_in_memory_is_kept() -> None:
    images = torch.arange(120.0).view(2, 3, 4, 5).to(memory_format=torch.channels_last)
    found = there_and_back([images, np.asfortranarray(np.ones((2, 3)))])
    assert found[0].stride() == images.stride() and found[1].flags.f_contiguous


def test_a_view_is_stored_without_the_storage_around_it() -> None:
    assert len(codec.encode(torch.zeros(1 << 20)[:1], {}, foreign=True)) < 1000


def test_what_came_back_can_be_written_and_is_nobody_else_s() -> None:
    value = [torch.zeros(2), np.zeros(2), bytearray(2)]
    data = codec.encode(value, {}, foreign=True)
    first, second = codec.decode(data, {}, foreign=True), codec.decode(data, {}, foreign=True)
    for item in first:
        item[0] = 1
    assert same(second, value)
    first[0].resize_(5)


def test_a_long_row_of_numbers_costs_no_more_than_its_numbers() -> None:
    assert len(codec.encode(random.Random(1).getstate(), {}, foreign=True)) < 200 + 5 * 626


# ---- references


def test_what_appears_twice_stays_one() -> None:
    inner, tensor, pair = [1], torch.ones(2), (1, [2])
    deque = collections.deque([inner])
    a, b, first, second, dequed, pairs = there_and_back([inner, {"x": inner}, tensor, (tensor,), deque, [pair, pair]])
    assert a is b["x"] and first is second[0] and dequed[0] is a and pairs[0] is pairs[1]


def test_what_is_equal_stays_two() -> None:
    a, b = there_and_back([[1], [1]])
    assert a == b and a is not b


def test_what_contains_itself() -> None:
    looped: list[Any] = [1]
    looped.append({"me": (looped,)})
    found = there_and_back(looped)
    assert found[1]["me"][0] is found


def test_what_cannot_be_built_around_itself_is_refused() -> None:
    looped: Any = collections.deque()
    looped.append(looped)
    with pytest.raises(ValueError, match=f"nested deeper than {MAX_DEPTH}: flatten it"):
        codec.encode({"history": looped}, {}, foreign=False)


def test_doubling_stays_small() -> None:
    value: Any = ()
    for _ in range(100):
        value = (value, value)
    assert len(codec.encode(value, {}, foreign=True)) < 10_000


# ---- objects of the process


def test_the_process_s_objects_go_by_name() -> None:
    mine, theirs = nn.Linear(1, 1), nn.Linear(1, 1)
    data = codec.encode({"a": [mine, mine]}, {id(mine): "module:x"}, foreign=True)
    assert codec.decode(data, {"module:x": theirs}, foreign=True) == {"a": [theirs, theirs]}
    with pytest.raises(ValueError, match="refers to 'module:x', which this process does not have"):
        codec.decode(data, {}, foreign=True)


# ---- what is not known

Pair = collections.namedtuple("Pair", "a b")
UNKNOWN: dict[str, tuple[Any, str]] = {
    "object": ({"callbacks": [1, {"history": Plain()}]}, r"Plain at callbacks\[1\].history,"),
    "in a set": ([{Plain}], r"builtins.type at \[0\]\[0\],"),
    "as a value": (Plain(), "Plain at the top, or in a key,"),
    "odd keys": ({("a", 1): {"b c": Plain()}}, r"Plain at \[\('a', 1\)\]\['b c'\],"),
    "in a deque": ({"x": collections.deque([Plain()])}, r"Plain at x\[0\],"),
    "function": ({"fn": pathlib.Path}, r"builtins.type at fn,"),
    "named tuple": ({"pair": Pair(1, 2)}, "Pair at pair,"),
    "array of objects": ({"a": np.array([{}], dtype=object)}, "numpy.ndarray at a,"),
    "sparse tensor": ({"t": torch.ones(2).to_sparse()}, "torch.Tensor at t,"),
    "factory": ({"d": collections.defaultdict(Plain)}, "builtins.type at d.default_factory,"),
    "module": ({"m": nn.ReLU()}, "torch.nn.modules.activation.ReLU at m,"),
}


@pytest.mark.parametrize("value, message", UNKNOWN.values(), ids=UNKNOWN)
def test_for_another_machine_it_is_refused_with_its_path(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message} which cannot be sent to another machine: keep numbers"):
        codec.encode(value, {}, foreign=True)


def test_on_this_node_it_is_pickled() -> None:
    tensor, linear = torch.ones(1), nn.Linear(1, 1)
    shared = Plain([tensor, linear])
    value = {"a": [shared, Plain(shared)], "b": (shared, Pair(1, 2)), "c": torch.ones(2).to_sparse(), "d": np.array([{}], dtype=object)}
    found = codec.decode(codec.encode(value, {id(linear): "x"}, foreign=False), {"x": linear}, foreign=False)
    first, second = found["a"]
    assert second.held is first is found["b"][0] and first.held[0] == 1 and first.held[1] is linear and found["b"][1] == Pair(1, 2)
    assert found["c"].is_sparse and found["d"][0] == {}


def test_what_pickle_cannot_take_either_is_named() -> None:
    with pytest.raises(ValueError, match=r"builtins.function at a.hook, which cannot be stored \(.*\): leave it out of what is saved"):
        codec.encode({"a": {"b": Plain(), "hook": lambda: None}}, {}, foreign=False)


def test_a_pickle_from_another_machine_is_not_read() -> None:
    data = codec.encode(["x", Plain()], {}, foreign=False)
    with pytest.raises(ValueError, match="it holds a pickle, which is not read from another machine"):
        codec.decode(data, {}, foreign=True)


# ---- limits


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def test_too_deep() -> None:
    with pytest.raises(ValueError, match="at a.*, which is nested deeper than 100: flatten it"):
        codec.encode({"a": nested(MAX_DEPTH + 1)}, {}, foreign=False)


def test_too_much_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "MAX_STRUCTURE_BYTES", 1 << 10)
    with pytest.raises(ValueError, match="of structure, the limit is .*: keep long histories in tensors, or shorten them"):
        codec.encode([[i] for i in range(1000)], {}, foreign=True)
