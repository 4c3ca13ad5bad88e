"""Data sets over memory-mapped caches of tokens, and the data modules that make them.

The names below are loaded when they are asked for: reading an indexed file needs numpy, not torch or lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_gemini.datasets.indexed import IndexedDataset
    from lightning_gemini.datasets.modules import ArrowDataModule, IndexedDataModule, JsonLinesDataModule, TextDataModule
    from lightning_gemini.datasets.windows import TokenWindows
    from lightning_gemini.datasets.writer import IndexedWriter

_HOMES = {
    "ArrowDataModule": "modules",
    "IndexedDataModule": "modules",
    "IndexedDataset": "indexed",
    "IndexedWriter": "writer",
    "JsonLinesDataModule": "modules",
    "TextDataModule": "modules",
    "TokenWindows": "windows",
}
__all__ = [
    "ArrowDataModule",
    "IndexedDataModule",
    "IndexedDataset",
    "IndexedWriter",
    "JsonLinesDataModule",
    "TextDataModule",
    "TokenWindows",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
