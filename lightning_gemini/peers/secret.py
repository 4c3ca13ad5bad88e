"""The job's secret: from a file that only its owner can read, or from the environment."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "LIGHTNING_GEMINI_TOKEN"


def read(file: str | None, environ: Mapping[str, str], key: str) -> bytes:
    """The secret, empty if there is none. `key` names the option. Raises `ValueError` for a file that others can read, or that is empty."""
    if file is None:
        return environ.get(VARIABLE, "").strip().encode()
    try:
        data, mode = Path(file).read_bytes().strip(), Path(file).stat()
    except OSError as error:
        raise ValueError(f"{key}={file!r} cannot be read: {error.strerror}") from None
    if mode.st_mode & (stat.S_IRWXG | stat.S_IRWXO) or mode.st_uid not in (os.geteuid(), 0):
        raise ValueError(f"{key}={file!r} can be read by others: chmod 600 it, and own it")
    if not data:
        raise ValueError(f"{key}={file!r} is empty: write a random text into it (openssl rand -hex 32)")
    return data
