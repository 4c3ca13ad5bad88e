"""The parts of all nodes become one checkpoint: DCP's `.metadata`, written last.

Seam: `commit(folder, step, nodes)`. Before `.metadata` is published it is certain that every part is there and of this step, that every
file is as long as its index says, and that the boxes of each tensor fill it exactly: `.metadata` is a promise.

Names: arenas have tensors by `Segment.name`; `Names` says under which keys of the state dict readers find them. Several keys may point
to the same bytes, so both layouts of Lightning (`optimizer_0` of a sharded checkpoint, `optimizer_states` of a plain one) cost nothing.

Failure: `ValueError` that names the file or tensor, or the file system's `OSError`; the checkpoint stays incomplete.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable

import msgspec
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from lightning_gemini.compat import dcp
from lightning_gemini.storage.files import Folder
from lightning_gemini.storage.layout import METADATA, NAMES, SUMMARY, Box, Names, Part, Summary, decode, part_file, rank_file
from lightning_gemini.storage.persist import FORMAT_NUMBER

Offset = tuple[int, ...]


def commit(folder: Folder, step: int, nodes: list[int], *, replicated: bool) -> None:
    """Complete the checkpoint in `folder`, of which `nodes` have written their parts."""
    assert sorted(nodes) == list(range(len(nodes))), f"nodes are numbered from 0: {nodes}"
    parts = [_part(folder, node, step) for node in nodes]
    names = decode(folder.read(NAMES), Names, NAMES)
    boxes = [box for part in parts for box in part.boxes] + names.boxes
    ends = [(box.file, box.start + box.length) for box in boxes] + [(blob.file, blob.start + blob.length) for blob in names.blobs]
    _check_files(folder, ends)
    ranks = sorted(rank for part in parts for rank in part.ranks)
    _check_ranks(folder, ranks)
    metadata = index(names, boxes)
    folder.write(SUMMARY, msgspec.json.encode(Summary(FORMAT_NUMBER, step, len(ranks), len(nodes), replicated)))
    folder.publish(METADATA, pickle.dumps(metadata))


def _part(folder: Folder, node: int, step: int) -> Part:
    name = part_file(node)
    part = decode(folder.read(name), Part, name)
    if part.step != step:
        raise ValueError(f"{name} is of step {part.step}, not of {step}")
    return part


def _check_files(folder: Folder, ends: Iterable[tuple[str, int]]) -> None:
    for file, end in dict(sorted(ends)).items():  # the last end of each file
        size = folder.size(file)
        if size < end:
            raise ValueError(f"{file} has {size} bytes, but its index says {end}: the file system has lost some")


def _check_ranks(folder: Folder, ranks: list[int]) -> None:
    if ranks != list(range(len(ranks))):
        raise ValueError(f"the parts are of ranks {ranks}: one is missing, or there twice")
    for rank in ranks:
        if folder.size(rank_file(rank)) <= 0:
            raise ValueError(f"{rank_file(rank)} is missing")


def index(names: Names, boxes: list[Box]) -> Metadata:
    """DCP's index of the state dict."""
    tensors: dict[str, dict[Offset, Box]] = {}
    for box in sorted(boxes, key=lambda box: (box.name, box.offset, box.shard)):  # equal boxes of several shards or nodes: the first
        if math.prod(box.shape) or not math.prod(box.whole):  # an empty shard of a tensor that is not empty is no box
            tensors.setdefault(box.name, {}).setdefault(box.offset, box)
    for name, found in tensors.items():
        _check_filled(name, found)
    blobs = {blob.source: blob for blob in names.blobs}
    metadata = Metadata({}, planner_data={}, storage_data={})
    for key in names.keys:
        metadata.planner_data[key.name] = key.path
        if key.source in tensors:
            _add_tensor(metadata, key.name, tensors[key.source])
        elif key.source in blobs:
            blob = blobs[key.source]
            metadata.state_dict_metadata[key.name] = BytesStorageMetadata()
            metadata.storage_data[MetadataIndex(key.name)] = dcp.entry(blob.file, blob.start, blob.length)
        else:
            raise ValueError(f"no node has written {key.source}, which the state dict names {key.name}")
    return dcp.stamp(metadata)


def _check_filled(name: str, found: dict[Offset, Box]) -> None:
    whole = {box.whole for box in found.values()}
    if len(whole) != 1 or sum(math.prod(box.shape) for box in found.values()) != math.prod(next(iter(whole))):
        raise ValueError(f"{name}: boxes at {sorted(found)} do not fill {sorted(whole)}: a node's part lacks some, or shards overlap")


def _add_tensor(metadata: Metadata, name: str, found: dict[Offset, Box]) -> None:
    first = next(iter(found.values()))
    chunks = [ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape)) for box in found.values()]
    properties = TensorProperties(dtype=getattr(torch, first.dtype))
    metadata.state_dict_metadata[name] = TensorStorageMetadata(properties, torch.Size(first.whole), chunks)
    for offset, box in found.items():
        metadata.storage_data[MetadataIndex(name, offset)] = dcp.entry(box.file, box.start, box.length)
