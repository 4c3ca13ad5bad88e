"""Data modules for text, JSON lines, Arrow and Parquet, and for Megatron's indexed data sets. Made in Python, or by Hydra's `_target_`.

Seam: keyword settings; `fit(model, datamodule=...)`. The first three tokenise once, into a cache (`cache`) that all ranks, epochs and runs
map; calling `prepare_data()` by itself makes the cache beforehand, without a Trainer (making one takes longer than collectives wait, if
there are many gigabytes).

States: made (settings checked, files found, tokenizer loaded) -> prepared, on one rank of each node -> set up, on every rank: opened, or
made there if `prepare_data` ran elsewhere. Failures: a bad setting, no file, a missing package: one error when the module is made; a bad
document: one `ValueError` with file and line when the cache is made; trouble with the cache: see `cache`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_gemini.datasets import arrow, sources
from lightning_gemini.datasets.base import WindowsDataModule
from lightning_gemini.datasets.cache import Limits, Recipe, build_or_open
from lightning_gemini.datasets.indexed import IndexedDataset, paths_of
from lightning_gemini.datasets.settings import flag, require, whole
from lightning_gemini.datasets.store import TokenStore
from lightning_gemini.datasets.tokenizer import tokenizer_of, tokens_of


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_gemini"


def _named(key: str, value: object, remedy: str) -> str:
    require(isinstance(value, str) and bool(value), key, value, remedy)
    return str(value)


class CachedDataModule(WindowsDataModule):
    """Documents of some format, tokenised into a cache. A subclass says how they are read, and which of its settings change the text."""

    suffixes: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        tokenizer: Any = None,
        tokenizer_identity: str | None = None,
        end_of_document: int | str | None = None,
        cache_directory: str | os.PathLike[str] | None = None,
        cache_timeout_s: float = 3600.0,
        memory_limit_mib: int = 1024,
        verify: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        positive = isinstance(cache_timeout_s, (int, float)) and cache_timeout_s > 0
        require(positive, "cache_timeout_s", cache_timeout_s, "give a positive number of seconds")
        whole("memory_limit_mib", memory_limit_mib, 0)
        flag("verify", verify)
        ok = cache_directory is None or (isinstance(cache_directory, (str, os.PathLike)) and str(cache_directory) != "")
        require(ok, "cache_directory", cache_directory, "give a folder, or leave it out")
        self.cache_directory = default_cache() if cache_directory is None else Path(cache_directory).expanduser()
        self.tokenizer = tokenizer_of(tokenizer, tokenizer_identity, end_of_document)
        self.limits = Limits(wait_s=cache_timeout_s, memory_limit_mib=memory_limit_mib, verify=verify)
        for role in self.sources:
            self._files(role)
        self._stores: dict[str, TokenStore] = {}

    def _settings(self) -> dict[str, Any]:
        raise NotImplementedError

    def _documents(self, path: Path) -> Iterator[str]:
        raise NotImplementedError

    def _files(self, role: str) -> list[Path]:
        return sources.find(role, self.sources[role], self.suffixes)

    def prepare_data(self) -> None:
        for role in self.sources:
            self._store(role)

    def _store(self, role: str) -> TokenStore:
        """Kept for `setup` in the same process: where the disk is full it is in memory only."""
        if role not in self._stores:
            files = self._files(role)
            recipe = Recipe(sources=files, tokenizer=self.tokenizer.identity, settings=self._recipe(), dtype=self.tokenizer.dtype)
            self._stores[role] = build_or_open(
                self.cache_directory,
                recipe,
                lambda: tokens_of((text for path in files for text in self._documents(path)), self.tokenizer),
                self.limits,
            )
        return self._stores[role]

    def _recipe(self) -> dict[str, Any]:
        return {**self._settings(), "end_of_document": self.tokenizer.end_of_document}


class TextDataModule(CachedDataModule):
    """Plain text in UTF-8: one document per `file`, `line`, or `paragraph` (up to an empty line)."""

    suffixes = (".txt", ".txt.gz")

    def __init__(self, *, split: str = "file", **settings: Any) -> None:
        require(split in sources.SPLITS, "split", split, f"choose one of {', '.join(sources.SPLITS)}")
        self.split = split
        super().__init__(**settings)

    def _settings(self) -> dict[str, Any]:
        return {"format": "text", "split": self.split}

    def _documents(self, path: Path) -> Iterator[str]:
        return sources.text_documents(path, self.split)


class JsonLinesDataModule(CachedDataModule):
    """JSON lines, also compressed with gzip: one object per line, its text in `field`."""

    suffixes = (".jsonl", ".jsonl.gz")

    def __init__(self, *, field: str = "text", **settings: Any) -> None:
        self.field = _named("field", field, "name the field with the text")
        super().__init__(**settings)

    def _settings(self) -> dict[str, Any]:
        return {"format": "jsonl", "field": self.field}

    def _documents(self, path: Path) -> Iterator[str]:
        return sources.json_documents(path, self.field)


class ArrowDataModule(CachedDataModule):
    """Arrow IPC files and streams, and Parquet: one document per row, its text in `column`."""

    suffixes = (".arrow", ".feather", ".parquet")

    def __init__(self, *, column: str = "text", **settings: Any) -> None:
        self.column = _named("column", column, "name the column with the text")
        arrow.pyarrow()  # told now, not when the data is read
        super().__init__(**settings)

    def _settings(self) -> dict[str, Any]:
        return {"format": "arrow", "column": self.column}

    def _documents(self, path: Path) -> Iterator[str]:
        return arrow.arrow_documents(path, self.column)


class IndexedDataModule(WindowsDataModule):
    """Tokens that are there already: the prefix of a .bin/.idx pair of Megatron's. Nothing is added between its sequences."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for role, prefix in self.sources.items():
            ok = isinstance(prefix, (str, os.PathLike)) and all(path.is_file() for path in paths_of(Path(prefix).expanduser()))
            require(ok, role, prefix, "no such data set: give the prefix of a <prefix>.bin and <prefix>.idx")

    def _store(self, role: str) -> TokenStore:
        return IndexedDataset(Path(self.sources[role]).expanduser())
