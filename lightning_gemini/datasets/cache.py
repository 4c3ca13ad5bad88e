"""Tokens are made once, for all ranks, epochs and runs: a cache keyed by what they are made from.

Seam: `build_or_open(directory, recipe, produce, limits)` gives the tokens; `produce` is called only if they are not there. The key is the
content of the sources, the tokenizer's identity, the settings that change tokens and the version of our format; never a path or a time.

A cache is `<key>.bin`, `.idx`, `.json` (the manifest) and `.lock`. States: absent -> being built (`<key>.*.tmp.*`, under the lock) ->
complete, once the manifest has its name. Opened and built under the same lock, so that the second of two processes waits and opens.

When a step fails: a kill at any point leaves temporary files or names without a manifest, which the next holder of the lock removes or
replaces; it builds again. A cache that is refused (see `manifest`) is logged and built again; maps of the old one stay valid. A source
that changed since it was hashed, or that cannot be read: one `ValueError`, nothing left. A disk that is full or cannot be written: said,
cleaned up, and the tokens are kept in memory up to `memory_limit_mib`, beyond that one `OSError`. A lock not free in time: `TimeoutError`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_gemini.datasets import files, manifest
from lightning_gemini.datasets.content import Contents
from lightning_gemini.datasets.indexed import IndexedDataset
from lightning_gemini.datasets.lock import exclusive
from lightning_gemini.datasets.store import Array, TokenStore, TooLarge, in_memory
from lightning_gemini.datasets.writer import IndexedWriter

log = logging.getLogger(__name__)

Produce = Callable[[], Iterator[Array]]
"""Makes the tokens of each document, in order; it may be called twice."""
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides which tokens are made."""

    sources: Sequence[Path]
    tokenizer: str
    settings: Mapping[str, Any]
    dtype: np.dtype[Any]

    def key(self, contents: Contents) -> str:
        parts = {
            "format": manifest.FORMAT,
            "tokenizer": self.tokenizer,
            "settings": dict(self.settings),
            "dtype": self.dtype.str,
            "sources": [contents.of(path) for path in self.sources],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class Limits:
    wait_s: float = 3600.0
    memory_limit_mib: int = 1024
    verify: bool = False


class _Unwritable(Exception):
    """The cache's directory, not the sources."""


def build_or_open(directory: Path, recipe: Recipe, produce: Produce, limits: Limits | None = None) -> TokenStore:
    """The tokens of `recipe`, from the cache in `directory` or made by `produce` and kept there. Raises as the module's docstring says."""
    limits = limits or Limits()
    contents = Contents(directory)
    key = recipe.key(contents)
    try:
        with _writing():
            files.private(directory)
        contents.save()
        with _locked(directory / f"{key}.lock", limits.wait_s):
            found = _opened(directory, key, limits.verify)
            return found if found is not None else _built(directory, key, recipe, produce, contents)
    except _Unwritable as error:
        return _without(directory, recipe, produce, contents, limits, error)


@contextmanager
def _writing() -> Iterator[None]:
    """Tells a full disk of the cache from an error of the sources."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise _Unwritable(error.strerror) from error


@contextmanager
def _locked(path: Path, wait_s: float) -> Iterator[None]:
    lock = exclusive(path, wait_s)
    with _writing():
        lock.__enter__()
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def _opened(directory: Path, key: str, verify: bool) -> IndexedDataset | None:
    try:
        return manifest.opened(directory, key, verify)
    except manifest.Refused as reason:
        log.warning("token cache refused, it is made again: %s", reason)
        return None


def _built(directory: Path, key: str, recipe: Recipe, produce: Produce, contents: Contents) -> IndexedDataset:
    with _writing():
        _clear(directory, key)
        prefix = files.temporary(directory, key)
        writer = IndexedWriter(prefix, recipe.dtype)
    try:
        for document in produce():
            with _writing():
                writer.add(document)
            writer.end_document()
        contents.check_unchanged()
        with _writing():
            parts = writer.finish()
            for suffix in ("bin", "idx"):
                os.rename(f"{prefix}.{suffix}", directory / f"{key}.{suffix}")
            files.sync(directory)
            manifest.write(directory, key, parts)
    except BaseException:
        writer.abandon()
        _clear(directory, key)
        raise
    log.info("token cache %s made: %d MiB", directory / key, parts[0].size >> 20)
    return IndexedDataset(directory / key, thorough=False)


def _clear(directory: Path, key: str) -> None:
    """What is there of a cache, by whomever it was left. The manifest goes first: it vouches for the rest."""
    parts = [directory / f"{key}.{suffix}" for suffix in ("json", "bin", "idx")]
    for path in (*parts, *files.leftovers(directory, key)):
        path.unlink(missing_ok=True)


def _without(directory: Path, recipe: Recipe, produce: Produce, contents: Contents, limits: Limits, reason: _Unwritable) -> TokenStore:
    log.warning("no token cache in %s (%s): going on without it, with the tokens in memory", directory, reason)
    try:
        found = in_memory(produce(), recipe.dtype, limits.memory_limit_mib << 20)
        contents.check_unchanged()
        return found
    except TooLarge:
        cause = reason.__cause__
        number = cause.errno if isinstance(cause, OSError) else errno.ENOSPC
        message = f"the token cache cannot be written ({reason}), and the tokens are more than memory_limit_mib={limits.memory_limit_mib}: "
        raise OSError(number, f"{message}make room, or choose another cache_directory", str(directory)) from None
