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


def counting(loader: Any) -> dict[str, dict[str, Any]]:
    """The attributes of data set and samplers, live, by part. (Those of the loader itself are settings.)"""
    return {path: vars(part) for path, part in parts(loader) if path and hasattr(part, "__dict__")}


def scalars(attributes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The plain values among `counting`."""
    return {path: {name: value for name, value in own.items() if type(value) in _SCALARS} for path, own in attributes.items()}


def restore_scalars(attributes: dict[str, dict[str, Any]], values: dict[str, dict[str, Any]]) -> None:
    """Put `scalars` back into `counting`."""
    for path, own in values.items():
        attributes.get(path, {}).update(own)


def changed(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What of `after` differs from `before`."""
    return {
        path: {name: value for name, value in own.items() if name not in before[path] or before[path][name] != value}
        for path, own in after.items()
        if before.get(path) != own and path in before
    }
