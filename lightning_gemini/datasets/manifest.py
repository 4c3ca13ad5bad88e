"""What a complete cache says about itself: `<key>.json`, renamed into place after all else.

Seam: `write` a manifest, `opened` a cache by it. States of a cache: absent (no manifest) -> complete -> refused (`Refused`, with why).

What is checked when a cache is opened: the three files are plain files of ours or root's; the manifest is of this format and key; the
.idx has the size and the checksum; the .bin has the size, and, the first time after each boot of this machine or with `verify`, the
checksum. (A disk and a page cache go wrong between writing and reading, not between two epochs; 100 GB take a minute.) The boots that
have verified it are noted in the manifest, with the .bin's inode and times: a .bin written since is verified again.

Failures: anything amiss with the cache is `Refused`; no more descriptors or memory is the system's `OSError`, and the cache stays; a note
that cannot be written (a read-only directory) means verifying again next time.
"""

from __future__ import annotations

import contextlib
import errno
import json
from pathlib import Path
from typing import Any

from lightning_gemini.datasets import files
from lightning_gemini.datasets.content import hash_file
from lightning_gemini.datasets.files import Written
from lightning_gemini.datasets.indexed import IndexedDataset

FORMAT = 1
_BOOTS = 64
_OUR_OWN = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Nothing is wrong with the cache: this process, or this machine, has run out of something."""
_PARTS = ("bin", "idx")


class Refused(Exception):
    """A cache that is not to be used."""


def write(directory: Path, key: str, parts: tuple[Written, Written]) -> None:
    manifest: dict[str, Any] = {"format": FORMAT, "key": key, "verified": {}}
    manifest |= {name: part._asdict() for name, part in zip(_PARTS, parts, strict=True)}
    _note(directory, key, manifest)
    files.replace(directory / f"{key}.json", json.dumps(manifest).encode())


def opened(directory: Path, key: str, verify: bool) -> IndexedDataset | None:
    """The cache of `key`, None if there is none."""
    path = directory / f"{key}.json"
    if not path.is_symlink() and not path.exists():
        return None
    try:
        manifest = _read(path, key)
        for name in _PARTS:
            _check_file(directory / f"{key}.{name}", manifest[name]["size"])
        _check_content(directory / f"{key}.idx", manifest["idx"]["xxh3"])
        if verify or not _noted(directory, key, manifest):
            _check_content(directory / f"{key}.bin", manifest["bin"]["xxh3"])
            with contextlib.suppress(OSError):
                _note(directory, key, manifest)
                files.replace(path, json.dumps(manifest).encode())
        return IndexedDataset(directory / key, thorough=False)
    except (KeyError, TypeError, AttributeError) as error:
        raise Refused(f"{path} is garbled") from error
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in _OUR_OWN:
            raise
        raise Refused(str(error)) from error


def _read(path: Path, key: str) -> dict[str, Any]:
    if wrong := files.why_foreign(path):
        raise Refused(wrong)
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise Refused(f"{path} is garbled: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or manifest.get("key") != key:
        raise Refused(f"{path} is of another format or key")
    return manifest


def _check_file(path: Path, size: int) -> None:
    if wrong := files.why_foreign(path):
        raise Refused(wrong)
    if (found := path.stat().st_size) != size:
        raise Refused(f"{path} has {found} bytes instead of {size}")


def _check_content(path: Path, expected: str) -> None:
    if hash_file(path) != expected:
        raise Refused(f"{path} has another checksum than when it was written")


def _boot() -> str:
    """Names this boot of this machine; empty, which is never noted, where the kernel does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _mark(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def _noted(directory: Path, key: str, manifest: dict[str, Any]) -> bool:
    boot = _boot()
    return bool(boot) and manifest["verified"].get(boot) == _mark(directory / f"{key}.bin")


def _note(directory: Path, key: str, manifest: dict[str, Any]) -> None:
    if boot := _boot():
        others = {name: mark for name, mark in manifest["verified"].items() if name != boot}
        manifest["verified"] = {**dict(list(others.items())[1 - _BOOTS :]), boot: _mark(directory / f"{key}.bin")}
