"""The loader process: runs the user's DataLoader and keeps the batches around the ranks' position.

Seam: `Feeder(task, listener, owner).run()`, in the process that `forking` has made for it; it does not return.

States: serving -> ended (all ranks said Bye, or the owner is gone; then its whole process group goes). Its main thread runs the loader, a
second one talks to ranks. Failures: the loader raises -> the exception goes to every rank that gets there, as itself, never an early end;
the feeder dies -> ranks see end of file and start another at their position.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import selectors
import signal
import socket
import threading
from dataclasses import dataclass
from typing import Any

import msgspec

from lightning_gemini.config import DataConfig
from lightning_gemini.data.position import PositionedLoader
from lightning_gemini.forks import not_in_children
from lightning_gemini.mapped import wire
from lightning_gemini.mapped.encoding import Encoded, encode
from lightning_gemini.mapped.errors import carry, name_samples
from lightning_gemini.mapped.files import NO_ROOM, Held, Shelf, new_key
from lightning_gemini.mapped.window import Window
from lightning_gemini.unix import other_user

log = logging.getLogger(__name__)
_TICK_S = 1.0
_PAUSE_S = 0.05
_GRACE_S = 2.0
"""How long a feeder that is no longer needed waits for the batch it is making, so that its workers end in good order: one that is killed
while torch makes its shared memory leaves a file in /dev/shm."""


@dataclass(slots=True)
class Task:
    """What a feeder feeds."""

    loader: Any
    begin: dict[str, Any]
    """A position of `PositionedLoader`; its first batch is number `count` - 1, or 0."""
    ranks: int
    config: DataConfig


class Feeder:
    """See the module's docstring."""

    def __init__(self, task: Task, listener: socket.socket, owner: int) -> None:
        self.task, self._listener = task, listener
        config, first = task.config, max(task.begin["count"] - 1, 0)
        limits = {"ahead": config.prefetch_length, "behind": config.lookback_length, "limit": config.size_limit_mib << 20}
        self.window = Window(first, task.ranks, **limits)
        self._key = new_key() if config.encryption else b""
        self._shelf = Shelf(config.directory, self._key)
        self._last: tuple[wire.End | wire.Failed, Held | None] | None = None
        self._readers: dict[socket.socket, _Reader] = {}
        self._workers = getattr(task.loader, "num_workers", 0) > 0
        """What they put into shared memory is the batch's alone; what this process finds there may be written again."""
        self._inherited: Any = None
        self._made = threading.Event()
        self._ending = False
        self._selector = selectors.DefaultSelector()
        self._wake, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._wake.setblocking(False)
        self._owner = os.pidfd_open(owner)
        self._reserves = [os.dup(self._owner) for _ in range(task.ranks + 1)]
        """Given up where there are no descriptors, to let a rank in, and to say so."""
        for sock in (self._wake, self._waker):
            not_in_children(sock)

    def run(self) -> None:
        """Until nobody needs it."""
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        server = threading.Thread(target=self._serve, name="lightning-gemini-feeder", daemon=True)
        server.start()
        try:
            self._produce()
        except BaseException as error:  # whatever it is, the ranks must not wait for ever
            number = self.window.next
            self._give_up_reserve()
            text = Encoded([carry(error)], [])
            self._finish(wire.Failed(number=number, size=text.size), Shelf(None).put(text))
        self._made.set()
        server.join()

    # ---- the main thread: the loader

    def _produce(self) -> None:
        task = self.task
        name_samples(task.loader)
        self._inherited = getattr(task.loader, "_iterator", None)  # persistent workers are the rank's: not to be touched, nor dropped
        if self._inherited is not None:
            task.loader._iterator = None
        loader = PositionedLoader(task.loader, scalars=True)
        loader.begin_at(task.begin)
        if self._wait():
            batches = iter(loader)
            while self._wait():
                try:
                    batch = next(batches)
                except StopIteration:
                    after = encode(loader.carry())
                    return self._finish(wire.End(number=self.window.next, size=after.size), Shelf(None).put(after))
                self._put(loader, batch)
                del batch
            batches.close()  # type: ignore[attr-defined]  # ends the workers in good order

    def _wait(self) -> bool:
        return self.window.wait_until_wanted()

    def _put(self, loader: PositionedLoader, batch: Any) -> None:
        position = loader.position()
        after = {**loader.carry(), "loader": loader.own_state(), "workers": loader.workers_at(position["count"])}
        encoded = encode((batch, {"position": position, "after": after}), share=self._shelf.shares and self._workers)
        while self.window.wait_for_room(encoded.size):
            try:
                held = self._shelf.put(encoded)
            except OSError as error:
                if error.errno not in NO_ROOM or not self.window.shrink():
                    raise
                log.warning("no room for another batch (%s): from here on %s bytes are kept", error.strerror, self.window.limit)
            else:
                self.window.add(held)
                return self._notify()

    def _give_up_reserve(self) -> bool:
        if self._reserves:
            os.close(self._reserves.pop())
            return True
        return False

    def _finish(self, last: wire.End | wire.Failed, held: Held | None) -> None:
        self._last = (last, held)
        self._notify()

    def _notify(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._waker.send(b"\0")

    # ---- the second thread: the ranks

    def _serve(self) -> None:
        try:
            self._serve_ranks()
            self._listener.close()
            self.window.end()
            self._made.wait(_GRACE_S)
        except BaseException:
            log.exception("the loader process ends by a fault of its own; ranks start another")
        os.killpg(0, signal.SIGKILL)

    def _serve_ranks(self) -> None:
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake, selectors.EVENT_READ, self._on_wake)
        self._selector.register(self._owner, selectors.EVENT_READ, self._end)
        while not self.window.deserted and not self._ending:
            for key, _ in self._selector.select(_TICK_S):
                key.data()
            for reader in [reader for reader in self._readers.values() if reader.waits]:
                self._push(reader)

    def _end(self) -> None:
        self._ending = True

    def _on_wake(self) -> None:
        if signal.SIGTERM in self._wake.recv(4096):
            self._end()
        for reader in list(self._readers.values()):
            self._push(reader)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            if not self._give_up_reserve():
                self._made.wait(_PAUSE_S)
            return  # it is still in the queue
        not_in_children(sock)
        if other_user(sock) is not None:
            return sock.close()
        sock.setblocking(False)
        reader = _Reader(sock)
        self._readers[sock] = reader
        self._selector.register(sock, selectors.EVENT_READ, lambda: self._hear(reader))

    def _hear(self, reader: _Reader) -> None:
        try:
            data = _received(reader.sock)
            message = wire.decode_from_rank(data) if data else None
        except BlockingIOError:
            return
        except (OSError, msgspec.DecodeError):
            message = None
        match message:
            case wire.Attach(member=member, number=number):
                self._attach(reader, member, number)
            case wire.Want(number=number) if reader.member is not None:
                self.window.want(reader.member, number)
                self._push(reader)
            case wire.Want():  # it has not heard yet that its batch is gone
                pass
            case wire.Bye(member=member):
                self.window.leave(member)
                self._forget(reader)
            case _:
                self._forget(reader)

    def _attach(self, reader: _Reader, member: int, number: int) -> None:
        if not self.window.attach(member, number):
            reader.send(wire.Gone())
            return
        reader.member, reader.next = member, number
        reader.send(wire.Attached(key=self._key))
        self._push(reader)

    def _push(self, reader: _Reader) -> None:
        """All that is there and was not sent yet; what the socket does not take waits for the next occasion."""
        reader.waits = False
        with self.window.lock:
            while not reader.waits and reader.member is not None and not reader.ended:
                entry = self.window.batch(reader.next)
                if entry is not None:
                    if reader.send(wire.Batch(number=reader.next, sizes=entry.sizes), *entry.fds):
                        reader.next += 1
                elif reader.next < self.window.next:
                    reader.ended = reader.send(wire.Gone())
                elif self._last is not None:
                    message, held = self._last
                    reader.ended = reader.send(message, *(held.fds if held is not None else []))
                else:
                    return

    def _forget(self, reader: _Reader) -> None:
        self._selector.unregister(reader.sock)
        del self._readers[reader.sock]
        reader.sock.close()


def _received(sock: socket.socket) -> bytes:
    try:
        return sock.recv(wire.MAX_BYTES)
    except ConnectionResetError:  # it was closed with batches unread; what it said before lies behind that error
        return sock.recv(wire.MAX_BYTES)


class _Reader:
    """A rank's connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.member: int | None = None
        self.next = 0
        self.ended = False
        self.waits = False
        """There was no room for what comes next."""

    def send(self, message: wire.FromFeeder, *descriptors: int) -> bool:
        """False where there is no room: in the socket, or among the descriptors that this user may have under way (RLIMIT_NOFILE, for
        all processes together). A rank that is gone is noticed by its end of file."""
        try:
            socket.send_fds(self.sock, [wire.encode(message)], list(descriptors))
        except (BrokenPipeError, ConnectionResetError):
            pass
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ETOOMANYREFS, errno.ENOBUFS):
                raise
            self.waits = True
        return not self.waits
