"""A lane over TCP: one header of 24 bytes before everything, bulk bytes from the sender's memory into the receiver's.

Blocking sockets, with the kernel's own deadlines (SO_RCVTIMEO, SO_SNDTIMEO): a block is then one system call at each end, during which
Python's lock is free. No progress for `silence_s` ends the lane; keepalive ends one whose peer's machine has died while it was idle.

Failure: end of file, a deadline or nonsense -> `OSError` from the call that met it.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import socket
import struct

_HEAD = struct.Struct("<IIQII")  # kind, key, start, size, number
_MESSAGE, _PUSH, _PULL, _DATA = range(1, 5)
MAX_MESSAGE_BYTES = 64 << 20
"""The checksums of a payload of several TiB."""
SILENCE_S = 30.0


def set_limits(sock: socket.socket, receive_s: float | None, send_s: float | None = None) -> None:
    """Deadlines in the kernel, None for none."""
    for option, limit_s in ((socket.SO_RCVTIMEO, receive_s), (socket.SO_SNDTIMEO, send_s)):
        whole, part = divmod(limit_s or 0.0, 1)
        sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(whole), int(part * 1e6)))


def prepare(sock: socket.socket) -> None:
    """Blocking, no delay of small messages, and an end when the other machine is gone."""
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4)):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(SILENCE_S * 1000))


class TcpLane:
    """See `transport.Lane`."""

    def __init__(self, sock: socket.socket, *, silence_s: float = SILENCE_S) -> None:
        prepare(sock)
        self._sock, self._silence_s = sock, silence_s
        self._limit_s: float | None = silence_s
        set_limits(sock, silence_s, silence_s)
        self._keys = itertools.count(1)
        self._exposed: dict[int, tuple[memoryview, bool]] = {}
        self._pulls: dict[int, memoryview] = {}
        self._messages: collections.deque[bytes] = collections.deque()
        self._completed: collections.deque[int] = collections.deque()

    def say(self, message: bytes) -> None:
        """See `transport.Lane`."""
        self._send(_HEAD.pack(_MESSAGE, 0, 0, len(message), 0), memoryview(message))

    def hear(self, limit_s: float | None = None) -> bytes:
        """See `transport.Lane`."""
        while not self._messages:
            self._take(limit_s)
        return self._messages.popleft()

    def expose(self, memory: memoryview, *, writable: bool) -> int:
        """See `transport.Lane`."""
        key = next(self._keys)
        self._exposed[key] = (memory, writable)
        return key

    def hide(self, key: int) -> None:
        """See `transport.Lane`."""
        del self._exposed[key]

    def push(self, key: int, start: int, data: memoryview, number: int) -> None:
        """See `transport.Lane`."""
        self._send(_HEAD.pack(_PUSH, key, start, len(data), number), data)

    def pull(self, key: int, start: int, into: memoryview, number: int) -> None:
        """See `transport.Lane`."""
        self._pulls[number] = into
        self._send(_HEAD.pack(_PULL, key, start, len(into), number))

    def completion(self) -> int | None:
        """See `transport.Lane`."""
        while not self._completed:
            if self._messages:
                return None
            self._take(self._silence_s)
        return self._completed.popleft()

    def shut(self) -> None:
        """See `transport.Lane`."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """See `transport.Lane`."""
        self._exposed.clear()
        self._pulls.clear()
        self._sock.close()

    # ---- what arrives

    def _take(self, limit_s: float | None) -> None:
        if limit_s != self._limit_s:
            set_limits(self._sock, limit_s, self._silence_s)
            self._limit_s = limit_s
        head = bytearray(_HEAD.size)
        self._fill(memoryview(head))
        kind, key, start, size, number = _HEAD.unpack(head)
        if kind == _MESSAGE:
            self._message(size)
        elif kind == _PUSH:
            self._fill(self._range(key, start, size, writable=True))
            self._completed.append(number)
        elif kind == _PULL:
            self._serve(key, start, size, number)
        elif kind == _DATA:
            self._data(size, number)
        else:
            raise ConnectionError("the other end sent what is no message of ours")

    def _message(self, size: int) -> None:
        if size > MAX_MESSAGE_BYTES:
            raise ConnectionError(f"the other end announced a message of {size} bytes, {MAX_MESSAGE_BYTES} are allowed")
        body = bytearray(size)
        self._fill(memoryview(body))
        self._messages.append(bytes(body))

    def _range(self, key: int, start: int, size: int, *, writable: bool) -> memoryview:
        memory, may_write = self._exposed.get(key, (memoryview(b""), False))
        if start + size > len(memory) or (writable and not may_write):
            raise ConnectionError(f"the other end reached for {size} bytes at {start} that it was not given")
        return memory[start : start + size]

    def _serve(self, key: int, start: int, size: int, number: int) -> None:
        data = self._range(key, start, size, writable=False) if key in self._exposed else memoryview(b"")
        self._send(_HEAD.pack(_DATA, 0, 0, len(data), number), data)

    def _data(self, size: int, number: int) -> None:
        into = self._pulls.pop(number, None)
        if into is None or size not in (0, len(into)):
            raise ConnectionError("the other end sent bytes that nobody asked for")
        self._fill(into[:size])
        self._completed.append(number)

    # ---- the socket

    def _send(self, head: bytes, data: memoryview | None = None) -> None:
        parts = [memoryview(head)] if data is None else [memoryview(head), data]
        try:
            while parts:
                sent = self._sock.sendmsg(parts)
                while parts and sent >= len(parts[0]):
                    sent -= len(parts.pop(0))
                if parts:
                    parts[0] = parts[0][sent:]
        except BlockingIOError:
            raise TimeoutError(f"the other end has taken nothing for {self._silence_s:g} s") from None

    def _fill(self, into: memoryview) -> None:
        try:
            while into:
                count = self._sock.recv_into(into, len(into), socket.MSG_WAITALL)
                if not count:
                    raise ConnectionResetError("the other end has closed the connection")
                into = into[count:]
        except BlockingIOError:
            raise TimeoutError(f"the other end has said nothing for {self._limit_s:g} s") from None
