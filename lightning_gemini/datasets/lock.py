"""One process at a time, on one file system.

Seam: `with exclusive(path, wait_s)`. States: waiting -> held -> free. The lock is the kernel's (`flock`): it goes with the process that
holds it, however that ends, so there is no stale lock to break. The file itself stays, empty but for who held it last: removing it would
let two processes hold a lock of the same name.

Failures: not free in time -> `TimeoutError` that says who holds it; a file system without locks -> `ValueError` that names the setting to
change; a directory that cannot be written -> the system's `OSError`, unless the file is there, which is enough to lock it.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

_TELL_AFTER_S = 2.0


@contextmanager
def exclusive(path: Path, wait_s: float) -> Iterator[None]:
    fd = _open(path)
    try:
        _acquire(fd, path, wait_s)
        try:
            yield
        finally:
            # Said aloud, not left to close: a child forked meanwhile has the same open file, and would keep the lock.
            fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)


def _open(path: Path) -> int:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags | os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not path.exists():
            raise
        return os.open(path, flags | os.O_RDONLY)


def _acquire(fd: int, path: Path, wait_s: float) -> None:
    began, told, pause = time.monotonic(), False, 0.01
    while not _try(fd, path):
        waited = time.monotonic() - began
        if waited >= wait_s:
            raise TimeoutError(
                f"{path} has been locked for {waited:.0f} s by {_holder(fd)}, which is making the same token cache: "
                f"raise cache_timeout_s={wait_s:g}, or end that process"
            )
        if waited > _TELL_AFTER_S and not told:
            log.info("waiting up to %g s for %s, which is making the token cache %s", wait_s, _holder(fd), path.stem)
            told = True
        time.sleep(min(pause, max(0.0, wait_s - waited)))
        pause = min(pause * 1.5, 0.5)
    _sign(fd)


def _try(fd: int, path: Path) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            remedy = "this file system has no locks: choose a directory on another one"
            raise ValueError(f"cache_directory={str(path.parent)!r} is not valid: {remedy}") from error
        raise


def _sign(fd: int) -> None:
    """For whoever waits. Not worth an error: the file may be read-only, the disk full."""
    try:
        os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode().ljust(96), 0)
    except OSError as error:
        log.debug("cannot write into the lock: %s", error)


def _holder(fd: int) -> str:
    return os.pread(fd, 96, 0).decode(errors="replace").strip() or "another process"
