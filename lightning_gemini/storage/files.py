"""A folder at any fsspec URL: the only way in which storage touches files.

Seam: `Folder(url)`, names relative to it. Nothing is cached: other nodes write to the same folder. Failure: a URL that fsspec does not
know raises `ValueError` with the remedy; everything else is the file system's own `OSError`. `publish` makes a file appear whole or not
at all: local file systems rename, object stores show an object when its upload is complete.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
from typing import Any

from fsspec.core import url_to_fs


class Folder:
    """Files below a URL or a local path."""

    def __init__(self, url: str) -> None:
        self.url = url if url.endswith("://") else url.rstrip("/") or url
        try:
            self.fs, self.path = url_to_fs(self.url, use_listings_cache=False) if "://" in url else url_to_fs(os.path.abspath(url))
        except (ValueError, ImportError) as error:
            remedy = "give a local folder or a URL of fsspec with its driver installed (s3:// needs s3fs, gs:// gcsfs)"
            raise ValueError(f"persistent.url={url!r} cannot be used: {error}; {remedy}") from None

    def _at(self, name: str) -> str:
        return f"{self.path}/{name}" if name else str(self.path)

    def below(self, name: str) -> Folder:
        """A folder in this one."""
        return Folder(f"{self.url}/{name}")

    def make(self, name: str = "") -> None:
        """Create the folder `name` in this one, and this one."""
        self.fs.makedirs(self._at(name), exist_ok=True)

    def create(self, name: str) -> Writing:
        """A stream that writes `name`; in a `with`, whose end syncs and closes it."""
        return Writing(self.fs.open(self._at(name), "wb"))

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file."""
        with self.create(name) as stream:
            stream.write(data)

    def publish(self, name: str, data: bytes) -> None:
        """Write a whole file that nobody ever sees half of."""
        self.write(f"{name}.tmp", data)
        self.fs.mv(self._at(f"{name}.tmp"), self._at(name))

    def read(self, name: str) -> bytes:
        """The bytes of a file."""
        return bytes(self.fs.cat_file(self._at(name)))

    def read_ranges(self, ranges: list[tuple[str, int, int]]) -> list[bytes]:
        """(name, start, length) -> bytes; at once where the file system can."""
        names = [self._at(name) for name, _, _ in ranges]
        starts, ends = [start for _, start, _ in ranges], [start + length for _, start, length in ranges]
        return [bytes(data) for data in self.fs.cat_ranges(names, starts, ends, on_error="raise")]

    def size(self, name: str) -> int:
        """Bytes of a file; -1 when there is none."""
        self.fs.invalidate_cache()
        try:
            return int(self.fs.info(self._at(name))["size"])
        except FileNotFoundError:
            return -1

    def folders(self) -> list[str]:
        """Names of the folders in this one; none when it does not exist."""
        return [name for name, kind in self._list() if kind == "directory"]

    def files(self) -> list[str]:
        """Names of all files below, relative to this folder."""
        self.fs.invalidate_cache()
        prefix = len(str(self.path).rstrip("/")) + 1
        return sorted(found[prefix:] for found in self.fs.find(self.path))

    def _list(self) -> list[tuple[str, str]]:
        self.fs.invalidate_cache()
        try:
            entries: list[dict[str, Any]] = self.fs.ls(self.path, detail=True)
        except FileNotFoundError:
            return []
        return [(entry["name"].rstrip("/").rpartition("/")[2], entry["type"]) for entry in entries]

    def remove(self, name: str) -> None:
        """Remove a file; one that has gone already is no error."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self._at(name))

    def remove_folder(self, name: str = "") -> None:
        """Remove an empty folder; one that is not empty stays. Object stores have none."""
        with contextlib.suppress(OSError, NotImplementedError):
            self.fs.rmdir(self._at(name))


class Writing:
    """A file under way. An exception inside the `with` leaves what was written so far; whoever began it removes it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __enter__(self) -> Any:
        return self._stream

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self._stream.flush()
                with contextlib.suppress(AttributeError, io.UnsupportedOperation):  # remote files have no descriptor
                    os.fsync(self._stream.fileno())
        finally:
            self._stream.close()


def _cause(error: BaseException) -> BaseException:
    """torch reports a stream that failed as an error of its own file format, in whose context the stream's own error is."""
    inner = error.__cause__ or error.__context__
    return _cause(inner) if isinstance(error, RuntimeError) and inner is not None else error


def explain(error: BaseException, url: str) -> str:
    """One line for the user: what happened at `url`, and what helps."""
    error = _cause(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"persistent.url={url!r} is full ({error}): free space there or lower persistent.keep_last; training goes on"
    if isinstance(error, OSError):
        return f"persistent.url={url!r} cannot be used ({type(error).__name__}: {error}): see that it is there and may be written"
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
