"""The rank-local state as bytes that are safe to cross a socket: reading them runs no code of theirs and makes no object they choose.

Seam: `encode(value, names, foreign=…)` and `decode(data, anchors, foreign=…)`. Types, order and shared references come back as they were.
Known are Python's plain values and containers, what `codec_types` lists, and dense tensors. Objects in `names` (the process's own trainer,
model, callbacks) go by name and come back as the reader's own.

What is neither depends on where the bytes go. `foreign=False`, memory of this node only: all such objects lie in one pickle beside the
rest; they keep references among each other, but share none with the rest. `foreign=True`, read on another machine: no pickle is written
or read.

Layout: `<magic> <Q bytes of codes> <Q of leaves> <Q of raw> <Q of pickle>`, then these four. Codes are words of 64 bits, the structure.
Leaves are None, booleans, integers, floats and strings, in the order of the walk, as one flat MessagePack array: one call of C for all of
them, and no nesting that could exhaust its stack. Raw is the content of bytes and tensors.

Failures are `ValueError`: in `encode` with the path, the type and the remedy; in `decode` for whatever is wrong with the bytes. `decode`
takes memory in proportion to the bytes it is given, and walks no deeper than `MAX_DEPTH`.
"""

from __future__ import annotations

import io
import pickle
import struct
from array import array
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import torch

from lightning_gemini.state.codec_reader import Reader
from lightning_gemini.state.codec_types import MAX_DEPTH, Leaf
from lightning_gemini.state.codec_writer import TooDeep, Writer

_MAGIC = b"LGS1"
_HEAD = struct.Struct("<4s4Q")
MAX_STRUCTURE_BYTES = 64 << 20
"""Of codes and leaves, which make objects; raw content has no limit but its own size."""
Buffer = bytes | bytearray | memoryview

_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(list[Leaf]).decode


def encode(value: Any, names: Mapping[int, str], *, foreign: bool) -> bytes:
    """`value` as bytes. `names` maps `id(object)` to the name under which the reader has its own.

    Raises `ValueError` for a value that cannot be stored: with `foreign` whatever only pickle could, without what pickle cannot either;
    nested deeper than `MAX_DEPTH`; with more structure than `MAX_STRUCTURE_BYTES`.
    """
    writer = Writer(names)
    try:
        writer.put(value)
    except TooDeep as error:
        raise _refused(value, error.value, f"is nested deeper than {MAX_DEPTH}", "flatten it") from None
    if foreign and writer.unknown:
        why, remedy = "cannot be sent to another machine", "keep numbers, strings, tensors, or containers of them"
        raise _refused(value, writer.unknown[0], why, remedy)
    pickled = _pickled(value, writer.unknown, names) if writer.unknown else b""
    leaves = _packed(writer.leaves, writer.codes, writer.raw)
    codes = array("Q", writer.codes).tobytes()
    if len(codes) + len(leaves) > MAX_STRUCTURE_BYTES:
        raise ValueError(
            f"the rank-local state has {(len(codes) + len(leaves)) >> 20} MiB of structure, the limit is {MAX_STRUCTURE_BYTES >> 20}: "
            "keep long histories in tensors, or shorten them"
        )
    raw = b"".join(writer.raw)
    return b"".join([_HEAD.pack(_MAGIC, len(codes), len(leaves), len(raw), len(pickled)), codes, leaves, raw, pickled])


def decode(data: Buffer, anchors: Mapping[str, Any], *, foreign: bool, device: torch.device | None = None) -> Any:
    """Inverse of `encode`. Tensors that were on an accelerator come back on `device`, the reader's own; without one on the CPU.

    Raises `ValueError` for anything that `encode` has not written, for a name that `anchors` lacks, and with `foreign` for a pickle.
    """
    try:
        codes, leaves, raw, pickled = _parts(memoryview(data))
        if foreign and len(pickled):
            raise ValueError("it holds a pickle, which is not read from another machine")
        unknown = _unpickled(pickled, anchors) if len(pickled) else []
        return Reader(codes, _unpack(leaves), raw, unknown, anchors, device or torch.device("cpu")).value()
    except Exception as error:  # constructors of a dozen types refuse hostile input, each in its own way
        raise ValueError(f"the rank-local state cannot be read: {type(error).__name__}: {error}") from error


def _parts(data: memoryview) -> tuple[list[int], memoryview, bytearray, memoryview]:
    magic, *sizes = _HEAD.unpack_from(data)
    if magic != _MAGIC or _HEAD.size + sum(sizes) != len(data) or sizes[0] + sizes[1] > MAX_STRUCTURE_BYTES:
        raise ValueError("it is damaged, or of another version")
    rows, at = list[memoryview](), _HEAD.size
    for size in sizes:
        rows.append(data[at : at + size])
        at += size
    codes = array("Q")
    codes.frombytes(rows[0])
    return codes.tolist(), rows[1], bytearray(rows[2]), rows[3]


def _packed(leaves: list[Leaf], codes: list[int], raw: list[Any]) -> bytes:
    """The leaves. MessagePack has no integers beyond 64 bits and no surrogates: those few lie in raw, after everything else."""
    try:
        packed, odd = _pack(leaves), list[tuple[int, bytes]]()
    except (OverflowError, UnicodeEncodeError):
        odd = [(i, data) for i, leaf in enumerate(leaves) if (data := _odd(leaf)) is not None]
        leaves = list(leaves)
        for i, _ in odd:
            leaves[i] = isinstance(leaves[i], int)
        packed = _pack(leaves)
    for i, data in odd:
        codes += (i, len(data))
        raw.append(data)
    codes.append(len(odd))
    return packed


def _odd(leaf: Leaf) -> bytes | None:
    if type(leaf) is int and not -(1 << 63) <= leaf < 1 << 64:
        return leaf.to_bytes(leaf.bit_length() // 8 + 1, "little", signed=True)
    if type(leaf) is str:
        try:
            leaf.encode()
        except UnicodeEncodeError:
            return leaf.encode("utf-8", "surrogatepass")
    return None


def _pickled(root: Any, unknown: list[Any], names: Mapping[int, str]) -> bytes:
    def dumps(value: Any) -> bytes:
        buffer = io.BytesIO()
        pickler = pickle.Pickler(buffer, protocol=5)
        pickler.persistent_id = lambda item: names.get(id(item))  # type: ignore[method-assign]
        pickler.dump(value)
        return buffer.getvalue()

    try:
        return dumps(unknown)
    except Exception:  # whatever a user's class raises
        for value in unknown:
            try:
                dumps(value)
            except Exception as error:
                raise _refused(root, value, f"cannot be stored ({error})", "leave it out of what is saved") from error
        raise


def _unpickled(data: memoryview, anchors: Mapping[str, Any]) -> list[Any]:
    unpickler = pickle.Unpickler(io.BytesIO(data))
    unpickler.persistent_load = anchors.__getitem__  # type: ignore[method-assign]
    return unpickler.load()  # type: ignore[no-any-return]


def _refused(root: Any, value: Any, why: str, remedy: str) -> ValueError:
    kind = type(value)
    path = "".join(_path(root, value, set())).lstrip(".") or "the top, or in a key"
    where = path if len(path) < 200 else f"{path[:200]}…"
    return ValueError(f"the rank-local state has a {kind.__module__}.{kind.__qualname__} at {where}, which {why}: {remedy}")


def _path(value: Any, wanted: Any, seen: set[int]) -> Iterator[str]:
    """The steps from `value` to `wanted`; nothing where there is no way."""
    if id(value) in seen:
        return
    seen.add(id(value))
    for step, child in _children(value):
        if child is wanted:
            yield step
            return
        rest = list(_path(child, wanted, seen))
        if rest:
            yield from (step, *rest)
            return


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{key!r}]", item) for key, item in value.items())
        yield ".default_factory", getattr(value, "default_factory", None)
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        yield from ((f"[{i}]", item) for i, item in enumerate(value))
