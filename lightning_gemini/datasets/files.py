"""Files that are whole or not there, and that are ours.

Seam: `Output` writes a new file and knows its checksum; `replace` puts bytes in the place of a file; `why_foreign` says why a file is not
to be trusted; `private` makes a directory. States of an `Output`: open -> finished (on the disk) | abandoned (closed; its owner removes
it). Failures are `OSError`s of the system, with the file's name; after one in the middle of `replace` the old file is still there.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path
from typing import NamedTuple

import xxhash

_BUFFER = 1 << 20


class Written(NamedTuple):
    size: int
    xxh3: str


class Output:
    """A new file, never one that exists. Its own buffer: abandoning it after an error must not try to write once more."""

    def __init__(self, path: Path, mode: int = 0o600) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        self._path, self._buffer, self._size = path, bytearray(), 0
        self._digest = xxhash.xxh3_128()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._digest.update(data)
        self._size += len(data)
        self._buffer += data
        if len(self._buffer) >= _BUFFER:
            self._flush()

    def _flush(self) -> None:
        try:
            rest = memoryview(bytes(self._buffer))
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            error.filename = str(self._path)
            raise
        self._buffer.clear()

    def finish(self) -> Written:
        self._flush()
        os.fsync(self._fd)
        self.abandon()
        return Written(self._size, self._digest.hexdigest())

    def abandon(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def temporary(directory: Path, stem: str) -> str:
    """A name that `leftovers` finds. Random, for file systems whose locks do not reach other nodes."""
    return str(directory / f"{stem}.{secrets.token_hex(4)}.tmp")


def leftovers(directory: Path, stem: str) -> list[Path]:
    """Whoever holds the lock of `stem` knows that their makers are dead."""
    return list(directory.glob(f"{stem}.*.tmp*"))


def replace(path: Path, data: bytes) -> None:
    new = Path(temporary(path.parent, path.stem))
    output = Output(new)
    try:
        output.write(data)
        output.finish()
        os.rename(new, path)
    except BaseException:
        output.abandon()
        new.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(directory: Path) -> None:
    """A rename is on the disk when its directory is."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def why_foreign(path: Path) -> str | None:
    """None if `path` is a plain file of ours or of root's. Links are not followed: they could lead to anything."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        return f"{path} is not a plain file"
    return _not_ours(path, status.st_uid)


def private(directory: Path) -> None:
    """Make `directory` and what is missing above it, for us alone."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):  # somebody else was faster
            path.mkdir(mode=0o700)
    wrong = _not_ours(directory, directory.stat().st_uid)
    if wrong or not directory.is_dir():
        raise ValueError(f"cache_directory={str(directory)!r} is not valid: {wrong or 'it is not a directory'}: choose another one")


def _not_ours(path: Path, uid: int) -> str | None:
    return None if uid in (os.geteuid(), 0) else f"{path} belongs to user {uid}, neither to us ({os.geteuid()}) nor to root"
