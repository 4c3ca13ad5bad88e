"""`torch.distributed.checkpoint`'s private corners: the entries of its index, and its reader for URLs.

Why each is needed (no public way exists):
    _StorageInfo            what `.metadata` says of where a tensor lies. Its own writer makes them from live tensors, in all ranks at once.
    CURRENT_DCP_VERSION     newer versions of torch note it in `.metadata`.
    _fsspec_filesystem      the public reader knows local paths only.
"""

from __future__ import annotations

from typing import Any

from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import StorageReader


def entry(file: str, start: int, length: int) -> Any:
    """Where an item lies: a file's name relative to the checkpoint, and bytes in it."""
    return filesystem._StorageInfo(file, start, length)


def stamp(metadata: Metadata) -> Metadata:
    """With DCP's version, where this version of torch notes it."""
    version = getattr(filesystem, "CURRENT_DCP_VERSION", None)
    if version is not None:
        metadata.version = version
    return metadata


def reader(url: str) -> StorageReader:
    """DCP's reader for a checkpoint at any URL of fsspec, or a local path."""
    found: StorageReader = FsspecReader(url)
    return found
