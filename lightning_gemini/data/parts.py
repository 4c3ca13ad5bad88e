"""What a loader is made of, and what of it changes while it runs: generators, and counters that data sets and samplers keep.

Seam: pure functions over a loader. Parts are the loader, its data set and its samplers, one level down; keys are their paths.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning_gemini.state import rng

_PARTS = ("dataset", "sampler", "batch_sampler", "_sampler")
_SCALARS = (int, float, bool, str, type(None))


def parts(loader: Any) -> Iterator[tuple[str, Any]]:
    """The loader and what it is made of, each once."""
    seen: set[int] = set()

    def visit(path: str, holder: Any) -> Iterator[tuple[str, Any]]:
        if holder is not None and id(holder) not in seen:
            seen.add(id(holder))
            yield path, holder
            for part in _PARTS:
                yield from visit(f"{path}{part}.", getattr(holder, "__dict__", {}).get(part))

    yield from visit("", loader)


def held_by(loader: Any) -> dict[str, Any]:
    """Generators held by the loader and by what it is made of."""
    return {f"{path}{name}": generator for path, part in parts(loader) for name, generator in rng.held_by(part).items()}


def scalars(loader: Any) -> dict[str, dict[str, Any]]:
    """Plain attributes of the parts, but not of the loader itself, whose are settings."""
    return {
        path: {name: value for name, value in getattr(part, "__dict__", {}).items() if type(value) in _SCALARS}
        for path, part in parts(loader)
        if path
    }


def restore_scalars(loader: Any, values: dict[str, dict[str, Any]]) -> None:
    """Put `scalars` back."""
    for path, part in parts(loader):
        for name, value in values.get(path, {}).items():
            if getattr(part, "__dict__", {}).get(name, value) != value:
                setattr(part, name, value)


def changed(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What of `after` differs from `before`."""
    return {
        path: {name: value for name, value in values.items() if before.get(path, {}).get(name, _MISSING) != value}
        for path, values in after.items()
    }


_MISSING = object()
