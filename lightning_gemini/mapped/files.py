"""Nameless files that hold one batch each.

Seam: `Shelf.put(parts) -> Held`; `read(fd, size, …)` maps such a file in another process that was handed its descriptor. A file has no
name: nobody else can open it, nothing is left behind however the job ends, and the kernel frees it with its last holder.

Where: shared memory (memfd), or the user's directory (O_TMPFILE). Failure: a directory that is full is said once, and shared memory takes
its place; without memory either, the error reaches the rank. Encryption (AES-256-GCM, a key per feeder that is never stored) is for a
directory on a disk; it costs the copy that mapping saves.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_gemini.mapped.encoding import Buffer, size_of

log = logging.getLogger(__name__)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NONCE_BYTES = 12
_MOST_PARTS = 512


@dataclass(slots=True)
class Held:
    """One file: its descriptor is closed by `close`."""

    fd: int
    size: int

    def close(self) -> None:
        """Give it back; maps of it stay valid."""
        os.close(self.fd)


class Shelf:
    """Makes files. One thread uses it."""

    def __init__(self, directory: str | None, key: bytes = b"") -> None:
        self._directory, self._key = directory, key

    def put(self, parts: Sequence[Buffer]) -> Held:
        """A new file with `parts`. Raises `OSError` where there is no room anywhere."""
        if self._key:
            parts = [_seal(self._key, b"".join(parts))]
        if self._directory is not None:
            try:
                return _write(_unnamed(self._directory), parts)
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                log.warning("mapped_data.directory=%s: %s; batches go to shared memory from here on", self._directory, error.strerror)
                self._directory = None
        return _write(os.memfd_create("gemini-batch", os.MFD_CLOEXEC), parts)


def _unnamed(directory: str) -> int:
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
        fd, path = tempfile.mkstemp(dir=directory)  # a file system without nameless files
        os.unlink(path)
        return fd


def _write(fd: int, parts: Sequence[Buffer]) -> Held:
    try:
        for first in range(0, len(parts), _MOST_PARTS):
            waiting = [memoryview(part).cast("B") for part in parts[first : first + _MOST_PARTS]]
            while waiting:
                written = os.writev(fd, waiting)
                while waiting and written >= waiting[0].nbytes:
                    written -= waiting.pop(0).nbytes
                if waiting:
                    waiting[0] = waiting[0][written:]
        return Held(fd, size_of(parts))
    except BaseException:
        os.close(fd)
        raise


def read(fd: int, size: int, key: bytes = b"") -> mmap.mmap | memoryview:
    """The file's content. What its reader writes into it stays its own: the map is private."""
    mapped = mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    if not key:
        return mapped
    with mapped:
        return memoryview(bytearray(_open(key, mapped)))


def new_key() -> bytes:
    """A key for `Shelf` and `read`."""
    _cipher(bytes(32))
    return secrets.token_bytes(32)


def _seal(key: bytes, data: bytes) -> bytes:
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return nonce + bytes(_cipher(key).encrypt(nonce, data, None))


def _open(key: bytes, data: mmap.mmap) -> bytes:
    return bytes(_cipher(key).decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], None))


def _cipher(key: bytes):  # type: ignore[no-untyped-def]  # the package is optional
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError:
        raise ValueError("mapped_data.encryption=True needs the package cryptography: pip install 'lightning_gemini[encryption]'") from None
    return AESGCM(key)
