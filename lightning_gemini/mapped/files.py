"""Nameless files that hold one batch each.

Seam: `Shelf.put(encoded) -> Held`; `read(fd, size)` maps such a file in another process that was handed its descriptor. A file has no
name: nobody else can open it, nothing is left behind however the job ends, and the kernel frees it with its last holder.

Where: shared memory (memfd), or the user's directory (O_TMPFILE). Failure: a directory that is full is said once, and shared memory takes
its place; without memory either, the error reaches the rank. Encryption (AES-256-GCM, a key per feeder that is never stored) is for a
directory on a disk; it costs the copy that mapping saves.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from lightning_gemini.mapped.encoding import Buffer, Encoded, size_of

log = logging.getLogger(__name__)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_ROOM = (*_FULL, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""Of `OSError`: there may be room when other batches have been given back."""
_NONCE_BYTES = 12
_MOST_PARTS = 512


@dataclass(slots=True)
class Held:
    """The files of one batch: its own, and shared memory that its tensors lie in. The descriptors are closed by `close`."""

    fds: list[int]
    sizes: list[int]

    @property
    def size(self) -> int:
        """Bytes of all."""
        return sum(self.sizes)

    def close(self) -> None:
        """Give them back; maps of them stay valid."""
        for fd in self.fds:
            os.close(fd)


class Shelf:
    """Makes files. One thread uses it."""

    def __init__(self, directory: str | None, key: bytes = b"") -> None:
        self._directory, self._key = directory, key

    @property
    def shares(self) -> bool:
        """Whether what lies in shared memory may stay there."""
        return self._directory is None and not self._key

    def put(self, encoded: Encoded) -> Held:
        """New files. Raises `OSError` where there is no room anywhere."""
        parts = [_seal(self._key, b"".join(encoded.parts))] if self._key else encoded.parts
        held = Held([self._file(parts)], [size_of(parts)])
        try:
            for fd, size in encoded.shared:
                held.fds.append(os.dup(fd))
                held.sizes.append(size)
        except OSError:
            held.close()
            raise
        return held

    def _file(self, parts: Sequence[Buffer]) -> int:
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


def _write(fd: int, parts: Sequence[Buffer]) -> int:
    try:
        for first in range(0, len(parts), _MOST_PARTS):
            waiting = [memoryview(part).cast("B") for part in parts[first : first + _MOST_PARTS]]
            while waiting:
                written = os.writev(fd, waiting)
                while waiting and written >= waiting[0].nbytes:
                    written -= waiting.pop(0).nbytes
                if waiting:
                    waiting[0] = waiting[0][written:]
        return fd
    except BaseException:
        os.close(fd)
        raise


def read(fd: int, size: int) -> memoryview:
    """The file's content. What its reader writes into it stays its own: the map is private. It needs the descriptor no more (Python's own
    `mmap` would keep one per batch)."""
    mapped = torch.from_file(f"/proc/self/fd/{fd}", shared=False, size=size, dtype=torch.uint8)
    return memoryview(cast(Any, mapped.numpy()))


def opened(mapped: memoryview, key: bytes) -> memoryview:
    """What was put there; with a `key`, decrypted into memory of its own."""
    return mapped if not key else memoryview(bytearray(_open(key, mapped)))


def new_key() -> bytes:
    """A key for `Shelf` and `opened`."""
    _cipher(bytes(32))
    return secrets.token_bytes(32)


def _seal(key: bytes, data: bytes) -> bytes:
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return nonce + bytes(_cipher(key).encrypt(nonce, data, None))


def _open(key: bytes, data: memoryview) -> bytes:
    return bytes(_cipher(key).decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], None))


def _cipher(key: bytes):  # type: ignore[no-untyped-def]  # the package is optional
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError:
        raise ValueError("mapped_data.encryption=True needs the package cryptography: pip install 'lightning_gemini[encryption]'") from None
    return AESGCM(key)
