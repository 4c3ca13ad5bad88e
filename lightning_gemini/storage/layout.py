"""What files a checkpoint is made of, and what is in those that are ours.

    step-<n>.<attempt>/
        .metadata               DCP's index, written last: without it there is no checkpoint
        meta.pt                 the Trainer's state, as Lightning writes it beside a sharded checkpoint
        __<node>_0.distcp       tensors, in DCP's own format; each tensor in the file of one node
        __names_0.distcp        what of the state dict is in no arena: buffers, values of the optimizers' groups, the Trainer's entries
        gemini/format           written first: this folder is ours
        gemini/node-<k>.part    `Part`: which boxes node k has written
        gemini/rank-<r>.state   `RankState`: what the arena of rank r needs besides tensors
        gemini/names            `Names`: keys of the state dict -> tensors
        gemini/checkpoint.json  `Summary`

A *box* is the local part of one tensor under one shard label, put together from the ranges that the ranks of a node have. Plain structs,
no torch. Files of ours are MessagePack. Failure: one that does not decode raises `ValueError` with its name.
"""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

METADATA, META, NAMES_DATA = ".metadata", "meta.pt", "__names_0.distcp"
FORMAT, NAMES, SUMMARY = "gemini/format", "gemini/names", "gemini/checkpoint.json"
_OURS = re.compile(r"\.metadata(\.tmp)?|meta\.pt|__\w+_0\.distcp|gemini/(format|names|checkpoint\.json|node-\d+\.part|rank-\d+\.state)")

FOLDER = re.compile(r"step-(\d+)(\.[A-Za-z0-9_-]+)?")
"""Name of a checkpoint's folder: its step, and the attempt."""

T = TypeVar("T")


def directory(step: int, attempt: str) -> str:
    """Name of the folder of an attempt to persist `step`; `attempt` (letters, digits, _ and -) must be new."""
    name = f"step-{step}.{attempt}"
    assert FOLDER.fullmatch(name), name
    return name


def data_file(node: int) -> str:
    """Of a node's tensors."""
    return f"__{node}_0.distcp"


def part_file(node: int) -> str:
    """Of a node's `Part`."""
    return f"gemini/node-{node}.part"


def rank_file(rank: int) -> str:
    """Of a rank's `RankState`."""
    return f"gemini/rank-{rank}.state"


def is_ours(name: str) -> bool:
    """Whether a file of a checkpoint, named relative to it, was written by us. Others are never removed."""
    return _OURS.fullmatch(name) is not None


class Box(msgspec.Struct, array_like=True, frozen=True):
    """Where the bytes of one box lie."""

    name: str
    """As `Segment.name`."""
    shard: str
    dtype: str
    whole: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    length: int
    """Of what `torch.save` wrote, in bytes."""


class Part(msgspec.Struct):
    """What one node has written."""

    step: int
    node: int
    ranks: list[int]
    boxes: list[Box]


class RankState(msgspec.Struct):
    """An arena's slot without the bytes of its segments."""

    rank: int
    step: int
    kind: int
    length: int
    """Of the payload in bytes."""
    capacity: int
    """Of a slot in bytes."""
    head: bytes
    """Beginning of the payload: the manifest with the rank-local state."""
    trailer: bytes


class Key(msgspec.Struct, array_like=True, frozen=True):
    """A leaf of the state dict that readers see. Several keys may have one source: shared parameters, both names of an optimizer."""

    path: tuple[str | int, ...]
    source: str
    """Name of a box or blob."""

    @property
    def name(self) -> str:
        """DCP's name of the leaf."""
        return ".".join(map(str, self.path))


class Blob(msgspec.Struct, array_like=True, frozen=True):
    """Where the bytes of a pickled value lie."""

    source: str
    file: str
    start: int
    length: int


class Names(msgspec.Struct):
    """The state dict of a checkpoint, and where that part of it is that no arena has."""

    keys: list[Key]
    boxes: list[Box]
    blobs: list[Blob]


class Summary(msgspec.Struct):
    """What somebody who looks for a checkpoint must know of it."""

    format: int
    step: int
    world: int
    nodes: int
    replicated: bool = True
    """Every rank held all tensors (DDP), each a share in its arena; else its shards."""


def decode(data: bytes, kind: type[T], name: str) -> T:
    """A file of ours. Raises `ValueError` with its name when it is damaged."""
    try:
        return msgspec.json.decode(data, type=kind) if name.endswith(".json") else msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is damaged: {error}") from None
