"""A rank's end of a feeder: batches in order, from any number on.

Seam: `Feed.connect(name, …)`, `attach(number)`, then `next()` until `EndOfData`; `close(bye=True)` when nothing more is needed.

States: attached -> ended. Failures: the feeder is gone (killed, out of memory) -> `FeederLost`, and the loader starts another at its
position; the batch is older than what is kept -> `BatchGone`, likewise; the user's exception is raised as itself.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from typing import Any

from lightning_gemini.forks import not_in_children
from lightning_gemini.mapped import wire
from lightning_gemini.mapped.encoding import decode
from lightning_gemini.mapped.errors import reproduce
from lightning_gemini.mapped.files import opened, read
from lightning_gemini.unix import other_user

_MOST_FDS = 16
_SLICE_S = 1.0
"""How long one wait for a batch lasts; how many follow is the loader's business: the first batch may take as long as it takes."""


class FeederLost(Exception):
    """The loader process has ended before its time."""


class EndOfData(StopIteration):
    """There is no further batch; `after` is what the loader's generators were then."""

    def __init__(self, after: Any) -> None:
        super().__init__("the end of the data")
        self.after = after


class BatchGone(Exception):
    """It no longer keeps that batch."""


class Feed:
    """See the module's docstring."""

    def __init__(self, sock: socket.socket, member: int) -> None:
        not_in_children(sock)
        self._sock, self._member = sock, member
        self._key, self._number = b"", 0
        sock.settimeout(_SLICE_S)

    @classmethod
    def connect(cls, name: str, member: int) -> Feed | None:
        """To a feeder that exists; None without one."""
        sock = wire.new_socket()
        try:
            sock.connect(wire.address(name))
        except (ConnectionRefusedError, FileNotFoundError):
            sock.close()
            return None
        if other_user(sock) is not None:
            sock.close()
            raise PermissionError(f"the loader process {name!r} belongs to another user: its data is not read")
        return cls(sock, member)

    def attach(self, number: int) -> None:
        """Read from batch `number` on."""
        self._number = number
        self._send(wire.Attach(member=self._member, number=number))

    def next(self) -> tuple[Any, Any]:
        """The next batch and its record. Raises `EndOfData`, `FeederLost`, `BatchGone`, or the user's exception."""
        self._send(wire.Want(number=self._number))
        while True:
            message, descriptors = self._receive()
            try:
                match message:
                    case wire.Attached(key=key):
                        self._key = key
                    case wire.Gone():
                        raise BatchGone(f"batch {self._number} is no longer kept")
                    case wire.Batch(number=number, sizes=sizes):
                        assert number == self._number, f"batch {number} came, {self._number} was expected"
                        self._number += 1
                        own, *shared = (read(fd, size) for fd, size in zip(descriptors, sizes, strict=True))
                        batch, record = decode(opened(own, self._key), shared)
                        return batch, record
                    case wire.End(size=size):
                        raise EndOfData(decode(read(descriptors[0], size)))
                    case wire.Failed(size=size):
                        raise reproduce(bytes(read(descriptors[0], size)))
            finally:
                for fd in descriptors:
                    os.close(fd)

    def _receive(self) -> tuple[wire.FromFeeder, list[int]]:
        while True:
            try:
                data, descriptors, flags, _ = socket.recv_fds(self._sock, wire.MAX_BYTES, _MOST_FDS)
            except TimeoutError:
                continue
            except OSError as error:
                raise FeederLost(str(error)) from None
            if not data:
                raise FeederLost("it has ended")
            if flags & socket.MSG_CTRUNC:
                raise OSError(errno.EMFILE, "no file descriptor is left for the next batch: raise the limit (ulimit -n)")
            return wire.decode_from_feeder(data), descriptors

    def _send(self, message: wire.FromRank) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # what was sent before may still be read
            self._sock.send(wire.encode(message))

    def close(self, *, bye: bool) -> None:
        """Leave; with `bye` the feeder need not wait for a replacement of this rank."""
        if bye:
            with contextlib.suppress(OSError):
                self._send(wire.Bye(member=self._member))
        self._sock.close()
