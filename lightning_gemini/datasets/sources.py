"""Documents out of the files that users have: where the files are, and which reader takes them.

Seam: `find` the files of a setting; `text_documents` and `json_documents` (and `arrow.arrow_documents`) give the documents of one, in
order, one at a time: nothing is loaded whole that need not be. Files compressed with gzip are known by their first bytes, not their name:
what is read must depend on the content alone, as the cache's key does. There is no state.

Failures: no file -> one `ValueError` that names the setting; a file that is no UTF-8, a bad line, an archive cut short -> a `ValueError`
with file and line. Empty documents are left out.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from lightning_gemini.datasets.settings import require

SPLITS = ("file", "line", "paragraph")
_GZIP = b"\x1f\x8b"


def find(key: str, value: object, suffixes: tuple[str, ...]) -> list[Path]:
    """The files that a setting names: a file, a folder (its files with one of `suffixes`), a glob, or a list of those."""
    remedy = f"give a file, a folder with {'/'.join(suffixes)} files, a glob, or a list of those"
    named = [value] if isinstance(value, (str, os.PathLike)) else value
    ok = isinstance(named, Sequence) and len(named) > 0 and all(isinstance(item, (str, os.PathLike)) and str(item) for item in named)
    require(ok, key, value, remedy)
    found: list[Path] = []
    for item in cast("Sequence[str | os.PathLike[str]]", named):
        matches = _matches(Path(item).expanduser(), suffixes)
        require(bool(matches), key, os.fspath(item), f"no such file: {remedy}")
        found += matches
    return found


def _matches(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    if path.is_dir():
        inside = (item for item in path.rglob("*") if item.name.endswith(suffixes) and item.is_file())
        return sorted(item for item in inside if not any(part.startswith(".") for part in item.relative_to(path).parts))
    if path.is_file():
        return [path]
    return [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(name)]


def text_documents(path: Path, split: str) -> Iterator[str]:
    """One document per file, per line, or per paragraph (lines up to an empty one)."""
    if split == "file":
        text = "".join(line for _, line in _lines(path))
        if text:
            yield text
        return
    held: list[str] = []
    for _, line in _lines(path):
        line = line.rstrip("\r\n")
        if line.strip() and split == "paragraph":
            held.append(line)
        elif line.strip():
            yield line
        elif held:
            yield "\n".join(held)
            held = []
    if held:
        yield "\n".join(held)


def json_documents(path: Path, field: str) -> Iterator[str]:
    """One JSON object per line, with the text in `field`."""
    for number, line in _lines(path):
        if line.strip():
            text = _field(line, field, f"{path}:{number}")
            if text:
                yield text


def _field(line: str, field: str, where: str) -> str:
    try:
        found: Any = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not a JSON line: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{where}: not a JSON line: nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where}: a JSON object with the field {field!r} was expected, not {line.strip()[:40]!r}")
    if field not in found:
        raise ValueError(f"{where}: no field {field!r}; there are {sorted(found)}: name it with field=")
    text = found[field]
    if not isinstance(text, str):
        raise ValueError(f"{where}: field {field!r} is {type(text).__name__}, not text: repair or leave out the line")
    if "\\u" in line and any("\ud800" <= char <= "\udfff" for char in text):  # only an escape can bring half a character
        raise ValueError(f"{where}: field {field!r} has half of a surrogate pair, which is no text: repair or leave out the line")
    return text


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Each line with its number, ends and all."""
    number = 0
    try:
        with _binary(path) as file:
            for number, line in enumerate(file, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{number}: not UTF-8 at byte {error.start} of the line ({error.reason})") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}:{number + 1}: the gzip archive is cut short or garbled: {error}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def _binary(path: Path) -> IO[bytes]:
    with open(path, "rb") as file:
        compressed = file.read(2) == _GZIP
    return cast("IO[bytes]", gzip.open(path, "rb")) if compressed else open(path, "rb")
