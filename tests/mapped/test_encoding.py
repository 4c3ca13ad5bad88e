"""A batch comes out of its bytes as it went in, without a copy."""

from __future__ import annotations

import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gemini.mapped.encoding import decode, encode
from lightning_gemini.mapped.files import Held, Shelf, read

DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
          torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128, torch.float8_e4m3fn]  # fmt: skip


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass
class Item:
    name: str
    value: Any


def joined(value: Any) -> bytearray:
    return bytearray(b"".join(encode(value).parts))


def again(value: Any) -> Any:
    return decode(joined(value))


def content(held: Held) -> Any:
    """Maps of a batch's files, decoded."""
    own, *others = [read(fd, size) for fd, size in zip(held.fds, held.sizes, strict=True)]
    return decode(own, others)


def same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape, found.requires_grad) == (expected.dtype, expected.shape, expected.requires_grad)
        assert bits(found) == bits(expected)
    elif isinstance(expected, np.ndarray):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.strides == expected.strides or not expected.size
        assert found.tobytes() == expected.tobytes()
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            same(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            same(a, b)
    elif isinstance(expected, Item):
        assert found.name == expected.name
        same(found.value, expected.value)
    else:
        assert found == expected


def bits(value: torch.Tensor) -> list[int]:
    """A NaN is not equal to itself."""
    found: list[int] = value.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8).tolist() if value.numel() else []
    return found


def random_tensor(shape: list[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bits (of a bool only those that one can have)."""
    size = int(np.prod(shape, dtype=int)) * dtype.itemsize
    raw = torch.from_numpy(np.random.default_rng(seed).integers(0, 2 if dtype is torch.bool else 256, size, dtype=np.uint8))
    return raw.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "whole": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1) if x.dim() else x,
    "offset": lambda x: x[1:] if x.dim() and len(x) else x,
    "every other": lambda x: x[::2] if x.dim() else x,
    "last column": lambda x: x[..., -1:] if x.dim() and x.shape[-1] else x,
    "expanded": lambda x: x.unsqueeze(0).expand(3, *x.shape),
}
tensors = st.builds(
    lambda shape, dtype, seed, view: VIEWS[view](random_tensor(shape, dtype, seed)),
    st.lists(st.integers(0, 4), max_size=4), st.sampled_from(DTYPES), st.integers(0, 9), st.sampled_from(sorted(VIEWS)),
)  # fmt: skip
arrays = st.builds(
    lambda shape, kind, order, seed: np.asarray(np.random.default_rng(seed).integers(0, 99, shape).astype(kind), order=order),
    st.lists(st.integers(0, 4), max_size=3), st.sampled_from(["u1", "i4", "f8", "c16", "?", "S3", "U2"]), st.sampled_from("CF"),
    st.integers(0, 9),
)  # fmt: skip
plain = st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.binary(max_size=99) | st.floats(allow_nan=False)
values = st.recursive(
    plain | tensors | arrays,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.builds(Pair, inner, inner),
        st.builds(Item, st.text(max_size=3), inner),
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(values)
def test_anything_comes_back(value: Any) -> None:
    data = joined(value)
    assert len(data) == encode(value).size
    same(decode(data), value)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_and_view(dtype: torch.dtype, view: str) -> None:
    value = VIEWS[view](random_tensor([3, 4], dtype, 1))
    same(again(value), value)


def test_memory_layouts_stay() -> None:
    """Nothing is rearranged where the elements lie dense."""
    image = torch.rand(2, 3, 4, 5)
    for value in (image.to(memory_format=torch.channels_last), image.permute(3, 1, 0, 2), image[1:], torch.rand(6).view(1, 6, 1)):
        assert again(value).stride() == value.stride() and torch.equal(again(value), value)
    assert again(image[:, :, ::2]).is_contiguous()
    assert len(joined(torch.rand(1000)[:2])) < 1000, "only the view is written, not its storage"
    assert len(joined(torch.zeros(1).expand(2, 2))) < 1000


KINDS: dict[str, torch.Tensor] = {
    "sparse": torch.eye(3).to_sparse(),
    "with a gradient": torch.rand(3, requires_grad=True),
    "conjugate": torch.rand(3, dtype=torch.complex64).conj(),
    "negative": torch.rand(3, dtype=torch.complex64).conj().imag,
    "zero-dimensional": torch.tensor(3.5),
    "empty": torch.empty(0, 3),
    "inference": torch.zeros(0),
}
with torch.inference_mode():
    KINDS["inference"] = torch.arange(3.0)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_tensors(kind: str) -> None:
    value = KINDS[kind]
    found = again({"x": value})["x"]
    assert found.layout == value.layout and found.requires_grad == value.requires_grad and found.shape == value.shape
    assert torch.equal(found.to_dense(), value.to_dense()) if value.layout is not torch.strided else torch.equal(found, value)


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:torch.quantize", "ignore:TypedStorage")
def test_subclasses_and_rare_layouts() -> None:
    compressed = torch.eye(3).to_sparse_csr()
    assert again(compressed).layout is torch.sparse_csr and torch.equal(again(compressed).to_dense(), torch.eye(3))
    parameter = again(torch.nn.Parameter(torch.rand(2)))
    assert type(parameter) is torch.nn.Parameter and parameter.requires_grad
    quantized = torch.quantize_per_tensor(torch.rand(4), 0.1, 0, torch.quint8)
    assert torch.equal(again(quantized).dequantize(), quantized.dequantize())


def test_structured_and_object_arrays() -> None:
    records = np.array([(1, 2.5, b"a"), (3, 4.5, b"b")], dtype=[("n", "i4"), ("x", "f8"), ("s", "S2")])
    assert again(records).tobytes() == records.tobytes() and again(records).dtype == records.dtype
    assert again(np.array([{"a": 1}, None], dtype=object)).tolist() == [{"a": 1}, None]
    assert again(np.arange(10)[::3]).tolist() == [0, 3, 6, 9]
    assert again(np.float32(2.5)) == np.float32(2.5)
    frozen = np.arange(4)
    frozen.flags.writeable = False
    assert again(frozen).tolist() == [0, 1, 2, 3]


def test_one_object_twice_is_one_object() -> None:
    x = torch.rand(3)
    loop: list[Any] = [x, {"x": x}, OrderedDict(a=x)]
    loop.append(loop)
    found = again(loop)
    assert found[0] is found[1]["x"] is found[2]["a"] and found[3] is found


def address(buffer: Any) -> int:
    return int(np.frombuffer(buffer, dtype=np.uint8).__array_interface__["data"][0])


@given(st.lists(tensors.filter(lambda x: x.numel() > 0) | arrays.filter(lambda x: x.size > 0), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_nothing_is_copied(items: list[Any]) -> None:
    """What is decoded lies in the map, at multiples of 64 bytes."""
    held = Shelf(None).put(encode(items))
    mapped = read(held.fds[0], held.size)
    held.close()
    start = address(mapped)
    for item in decode(mapped):
        pointer = item.data_ptr() if isinstance(item, torch.Tensor) else item.__array_interface__["data"][0]
        assert start <= pointer < start + held.size
        assert pointer % 64 == 0
    del item


def test_large_memory_is_referred_to() -> None:
    """Encoding does not copy: the parts are views of the tensor and of the array."""
    tensor, array = torch.zeros(1000), np.zeros(1000)
    parts = [part for part in encode([tensor, array]).parts if isinstance(part, memoryview)]
    assert [address(part) for part in parts] == [tensor.data_ptr(), array.__array_interface__["data"][0]]


def test_what_its_reader_writes_stays_its_own(tmp_path: Path) -> None:
    for directory in (None, str(tmp_path)):
        held = Shelf(directory).put(encode([torch.zeros(5), np.zeros(5)]))
        first, second = content(held), content(held)
        first[0].fill_(7)
        first[1][:] = 7
        for other in (second, content(held)):
            assert not other[0].any() and not other[1].any()
        held.close()
        assert first[0].tolist() == [7.0] * 5, "the map outlives the descriptor"


BIG = 1 << 16
"""Floats of a tensor that is worth a descriptor of its own."""


def shared(tensor: torch.Tensor) -> torch.Tensor:
    tensor.share_memory_()  # type: ignore[no-untyped-call]
    return tensor


@pytest.mark.parametrize("share", [False, True])
def test_large_tensors_in_shared_memory(share: bool) -> None:
    """They stay there, views of them too; the others are written, and all come back."""
    big, small, own = shared(torch.rand(2, BIG)), shared(torch.rand(9)), torch.rand(BIG)
    value = [own, small, big, big[1:], big.T, big[:, ::2], shared(torch.rand(2, BIG))]
    encoded = encode(value, share=share)
    held = Shelf(None).put(encoded)
    found = content(held)
    held.close()
    same(found, value)
    assert (len(encoded.shared) > 0) is share
    assert (len(joined(value)) > encoded.size - sum(size for _, size in encoded.shared)) is share
    found[2].fill_(7)
    assert not (big == 7).any(), "the map is private"


def test_not_more_of_them_than_a_message_takes() -> None:
    value = [shared(torch.full((BIG,), float(i))) for i in range(30)]
    encoded = encode(value, share=True)
    assert 0 < len(encoded.shared) <= 8
    held = Shelf(None).put(encoded)
    same(content(held), value)
    held.close()


class Refuses:
    def __reduce__(self) -> Any:
        raise pickle.PicklingError("not this one")


@pytest.mark.parametrize(
    "value", [lambda: None, threading.Lock(), Refuses(), (x for x in "ab")], ids=["lambda", "lock", "own", "generator"]
)
def test_what_cannot_be_pickled_is_one_clear_error(value: Any) -> None:
    with pytest.raises(TypeError, match="a batch cannot be handed to another process: .+"):
        encode({"x": torch.zeros(2), "y": value})
