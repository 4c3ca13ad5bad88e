"""How a bad setting, or a missing optional package, is told.

Seam: `require` for one setting, `optional` for a package that is not always installed. Neither keeps state. Failure: one `ValueError`
that names the key, the value and the remedy; one `ImportError` that names the extra to install.
"""

from __future__ import annotations

import importlib
from typing import Any


def require(condition: bool, key: str, value: object, remedy: str) -> None:
    if not condition:
        raise ValueError(f"{key}={value!r} is not valid: {remedy}")


def whole(key: str, value: object, least: int) -> None:
    """A bool is an int to Python, but `batch_size=True` is a mistake."""
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= least
    require(ok, key, value, f"give a whole number, {least} or more")


def flag(key: str, value: object) -> None:
    require(isinstance(value, bool), key, value, "give true or false")


def optional(package: str, purpose: str) -> Any:
    """Import a package of the extra `data`."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        message = f"{purpose} needs {package!r}, which cannot be imported ({error}): pip install 'lightning_gemini[data]'"
        raise ImportError(message, name=package) from error
