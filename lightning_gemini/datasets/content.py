"""What is in a file, as a short hash; remembered, because hashing 100 GB at every start takes minutes.

Seam: `Contents(directory)`; `of(path)`, `check_unchanged()`, `save()`. The memory is a side file, `sources.json`: real path -> [size,
mtime_ns, inode, hash]. A file is taken for unchanged while the first three are.

States of an entry: unknown -> hashed -> remembered. A file that changed within the last seconds is not remembered: its next change could
leave the same size within one tick of the file system's clock.

Failures: a side file that is unreadable, garbled or of another user is ignored and replaced; one that cannot be written costs the time
of hashing again, and a line in the debug log. A file that changes while it is hashed is a `ValueError`; one that cannot be read likewise.
"""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import xxhash

from lightning_gemini.datasets import files
from lightning_gemini.datasets.lock import exclusive

log = logging.getLogger(__name__)

_NAME = "sources"
_SETTLED_NS = 2_000_000_000
_ENTRIES = 1 << 16
_CHUNK = 1 << 22


class Contents:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known = _load(directory)
        self._new: dict[str, list[Any]] = {}
        self._seen: dict[Path, list[int]] = {}

    def of(self, path: Path) -> str:
        """The hash of what is in `path`."""
        name, mark = _real(path)
        self._seen[path] = mark
        known = self._known.get(name)
        if known is not None and known[:3] == mark:
            return str(known[3])
        try:
            digest = hash_file(path)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        if _real(path)[1] != mark:
            raise ValueError(f"{path} changed while it was read: begin when it is complete")
        self._known[name] = [*mark, digest]
        if time.time_ns() - mark[1] > _SETTLED_NS:
            self._new[name] = self._known[name]
        return digest

    def check_unchanged(self) -> None:
        """The tokens are of the files that were hashed."""
        for path, mark in self._seen.items():
            if _real(path)[1] != mark:
                raise ValueError(f"{path} changed while it was read: begin when it is complete")

    def save(self) -> None:
        if not self._new:
            return
        try:
            with exclusive(self._directory / f"{_NAME}.lock", wait_s=10.0):
                for dead in files.leftovers(self._directory, _NAME):
                    dead.unlink()
                merged = {**_load(self._directory), **self._new}
                kept = dict(list(merged.items())[-_ENTRIES:])
                files.replace(self._directory / f"{_NAME}.json", json.dumps(kept).encode())
                self._new.clear()
        except (OSError, TimeoutError, ValueError) as error:
            log.debug("hashes of sources are not remembered: %s", error)


def hash_file(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _real(path: Path) -> tuple[str, list[int]]:
    try:
        name = os.path.realpath(path)
        status = os.stat(name)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    return name, [status.st_size, status.st_mtime_ns, status.st_ino]


def _load(directory: Path) -> dict[str, list[Any]]:
    path = directory / f"{_NAME}.json"
    try:
        wrong = files.why_foreign(path)
        if wrong:
            log.warning("ignored: %s", wrong)
            return {}
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: entry for name, entry in found.items() if isinstance(entry, list) and len(entry) == 4}
