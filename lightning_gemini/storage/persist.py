"""A node's part of a checkpoint: tensors as DCP writes them, the rest of the arenas beside them, and an index of both.

Seam: `write_part` and `write_names` (on the node of rank 0). Order: the sign that the folder is ours, data, rank states, and the index
last: `commit` believes the index. A box is freed when it is written.

Failure: whatever the file system raises, after the files of this part were removed as far as it lets us. Other nodes' files and other
checkpoints are not touched.
"""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import torch
import xxhash

from lightning_gemini.snapshot.manifest import Segment
from lightning_gemini.storage.description import Description
from lightning_gemini.storage.files import Folder
from lightning_gemini.storage.gather import Gathered, Name
from lightning_gemini.storage.layout import FORMAT, META, NAMES, NAMES_DATA, Blob, Box, Names, Part, data_file, part_file, rank_file

FORMAT_NUMBER = 1


def begin(folder: Folder) -> None:
    """Make the folder, and the sign that it is ours."""
    folder.make("gemini")
    folder.write(FORMAT, str(FORMAT_NUMBER).encode())


def write_part(folder: Folder, found: Gathered, step: int, node: int) -> int:
    """Write what was gathered, which is empty afterwards; returns the bytes of tensors."""
    ranks = [state.rank for state in found.states]
    try:
        boxes = _write_boxes(folder, data_file(node), found.boxes)
        for state in found.states:
            folder.write(rank_file(state.rank), msgspec.msgpack.encode(state))
        folder.write(part_file(node), msgspec.msgpack.encode(Part(step, node, ranks, boxes)))
    except BaseException:
        _remove(folder, [part_file(node), data_file(node), *map(rank_file, ranks)])
        raise
    return max((box.start + box.length for box in boxes), default=0)


def write_names(folder: Folder, description: Description) -> None:
    """Write the state dict's names and what of it is in no arena."""
    try:
        with folder.create(NAMES_DATA) as stream:
            blobs = []
            for source, data in description.blobs.items():
                blobs.append(Blob(source, NAMES_DATA, stream.tell(), len(data)))
                stream.write(data)
            boxes = []
            for value in description.tensors:
                segment = Segment(value.source, value.shape, value.dtype, "", 0, len(value.data))
                boxes.append(_write_box(stream, NAMES_DATA, segment, bytearray(value.data)))
        folder.write(META, description.meta)
        folder.write(NAMES, msgspec.msgpack.encode(Names(description.keys, boxes, blobs)))
    except BaseException:
        _remove(folder, [NAMES, META, NAMES_DATA])
        raise


def _remove(folder: Folder, names: list[str]) -> None:
    for name in names:
        with contextlib.suppress(OSError):  # the file system that failed may fail again: `retain` removes what is left
            folder.remove(name)


def _write_boxes(folder: Folder, file: str, boxes: dict[Name, tuple[Segment, bytearray]]) -> list[Box]:
    """A plain tensor that several shards have, each its own (Adam's `step` under FSDP2), is written once as long as they are equal."""
    written: dict[tuple[object, ...], Box] = {}
    index = []
    with folder.create(file) as stream:
        while boxes:
            (name, shard), (segment, data) = boxes.popitem()
            key = name, _place(segment), xxhash.xxh3_64_intdigest(data)
            if key not in written:
                written[key] = _write_box(stream, file, segment, data)
            index.append(msgspec.structs.replace(written[key], shard=shard))
    return index


def _place(segment: Segment) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(whole, offset, shape) of a segment, whose `whole` and `offset` are empty for a plain tensor."""
    return segment.whole or segment.shape, segment.offset or (0,) * len(segment.shape), segment.shape


def _write_box(stream: Any, file: str, segment: Segment, data: bytearray) -> Box:
    dtype: torch.dtype = getattr(torch, segment.dtype)
    flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    start = stream.tell()
    torch.save(flat.view(dtype).view(segment.shape), stream)
    whole, offset, shape = _place(segment)
    return Box(segment.name, segment.shard, segment.dtype, whole, offset, shape, file, start, stream.tell() - start)
