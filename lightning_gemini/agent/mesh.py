"""Votes between the agents of a job: small frames over control connections, in the agent's own loop.

Seam: `open` at each generation, `own` when this node's words have changed; the job's row of the board follows. A child dials its parent (in
a thread that `close` and the next `open` join); the parent is handed the connection by the exchange. Only the newest words matter, so a
peer that does not read costs one frame of memory and holds nobody up.

Failure: a connection that breaks is reported with the node's name, and dialled again while the generation lasts.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from lightning_gemini.agent.memory import BOUNDARY, END_AT, GATE, REPLICATED, REPLICATED_AT_GATE, TENSORS, Board, step_of, tag
from lightning_gemini.agent.votes import Result, Votes, Words, parent
from lightning_gemini.peers.errors import RendezvousError

_FRAME = struct.Struct("<QQ8Q")  # kind, generation, words, replicated at gate, complete checkpoint
_UP, _DOWN = 1, 2
_RETRY_S = 0.1
_JOIN_S = 10.0


class Dialler(Protocol):
    """What the mesh needs of the exchange."""

    def connect_control(self, index: int) -> socket.socket:
        """A proved connection to a node of the present generation. Raises `OSError`."""


class Connection:
    """One control connection in the loop."""

    def __init__(
        self,
        sock: socket.socket,
        node: str,
        selector: selectors.BaseSelector,
        heard: Callable[[bytes], None],
        lost: Callable[[], None],
    ) -> None:
        self.sock, self.node, self._selector, self._heard, self._lost = sock, node, selector, heard, lost
        self._received, self._unsent, self._latest = b"", b"", b""
        sock.setblocking(False)
        selector.register(sock, selectors.EVENT_READ, self._ready)

    def say(self, frame: bytes) -> None:
        """Send, or keep until the socket takes it; a newer frame takes an older one's place."""
        self._latest = frame
        self._attempt(self._write)

    def _ready(self) -> None:
        self._attempt(self._read)
        self._attempt(self._write)

    def _attempt(self, act: Callable[[], None]) -> None:
        if self.sock.fileno() < 0:  # closed by something that was ready at the same time
            return
        try:
            act()
        except OSError:
            self.close()
            self._lost()

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                data = self.sock.recv(4096)
                if not data:
                    raise ConnectionResetError
                self._received += data
        while len(self._received) >= _FRAME.size:
            frame, self._received = self._received[: _FRAME.size], self._received[_FRAME.size :]
            self._heard(frame)

    def _write(self) -> None:
        events = selectors.EVENT_READ
        while self._unsent or self._latest:
            if not self._unsent:
                self._unsent, self._latest = self._latest, b""
            try:
                self._unsent = self._unsent[self.sock.send(self._unsent) :]
            except BlockingIOError:
                events |= selectors.EVENT_WRITE
                break
        if self.sock.fileno() >= 0:
            self._selector.modify(self.sock, events, self._ready)

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(self.sock)
        self.sock.close()


class Mesh:
    """See the module's docstring."""

    def __init__(
        self, dialler: Dialler, selector: selectors.BaseSelector, on_lost: Callable[[str], None], on_end_at: Callable[[int], None]
    ) -> None:
        self._dialler, self._selector, self._on_lost, self._on_end_at = dialler, selector, on_lost, on_end_at
        self._on_result: Callable[[Result], None] = lambda _: None
        self._board: Board | None = None
        self._votes: Votes | None = None
        self._number = -1
        self._nodes: Sequence[str] = ()
        self._connections: dict[int, Connection] = {}
        self._parent: int | None = None
        self._dialling: list[threading.Thread] = []
        self._over = threading.Event()
        self._dialled: list[tuple[int, int, socket.socket]] = []
        self._bell, self._ring = socket.socketpair()
        self._bell.setblocking(False)
        selector.register(self._bell, selectors.EVENT_READ, self._on_dialled)

    def open(self, number: int, index: int, nodes: Sequence[str], board: Board) -> None:
        """A generation begins, with these nodes by index."""
        for place, connection in list(self._connections.items()):
            if place >= len(nodes) or nodes[place] != connection.node:
                self._connections.pop(place).close()
        filled = (number, board) == (self._number, self._board)  # vacant places: what others have said still counts
        if not filled:
            self._over.set()
            board.set(board.job, END_AT, 0)
            self._votes = Votes(index, len(nodes), self._up, self._down, lambda word: tag(number, step_of(word) + 2))
        self._number, self._nodes, self._board, self._parent = number, nodes, board, parent(index)
        if self._parent is not None and self._parent not in self._connections and not (filled and self._is_dialling()):
            self._dial(self._parent)

    def own(self, words: Words) -> None:
        """The words of this node's ranks have changed."""
        if self._votes is not None:
            self._votes.own(words)

    def on_result(self, told: Callable[[Result], None]) -> None:
        """Who else wants to know what all ranks have reached."""
        self._on_result = told

    def completed(self, word: int) -> None:
        """At index 0: a checkpoint is complete."""
        if self._votes is not None:
            self._votes.completed(word)

    def accept(self, index: int, node: str, sock: socket.socket) -> None:
        """A child has connected."""
        self._add(index, node, sock)

    def _add(self, index: int, node: str, sock: socket.socket) -> None:
        if index >= len(self._nodes) or self._nodes[index] != node:
            sock.close()
            return
        if index in self._connections:
            self._connections.pop(index).close()
        connection = Connection(sock, node, self._selector, lambda frame: self._heard(index, frame), lambda: self._lost(index))
        self._connections[index] = connection
        if self._votes is not None:
            self._votes.repeat()

    def _lost(self, index: int) -> None:
        connection = self._connections.pop(index)
        if index == self._parent:
            self._dial(index)
        self._on_lost(connection.node)

    # ---- frames

    def _heard(self, index: int, frame: bytes) -> None:
        kind, number, *words, decided, complete = _FRAME.unpack(frame)
        if self._votes is None or number != self._number:
            return
        if kind == _UP:
            self._votes.heard(index, Words(*words))
        elif kind == _DOWN and index == self._parent:
            self._votes.told(Result(Words(*words), decided, complete))

    def _up(self, words: Words) -> None:
        connection = self._connections.get(-1 if self._parent is None else self._parent)
        if connection is not None:
            connection.say(_FRAME.pack(_UP, self._number, *words, 0, 0))

    def _down(self, result: Result) -> None:
        board, words = self._board, result.words
        assert board is not None
        board.set(board.job, REPLICATED_AT_GATE, result.replicated_at_gate)  # first: whoever sees the gate relies on it
        for word, value in ((REPLICATED, words.replicated), (GATE, words.gate), (TENSORS, words.tensors), (BOUNDARY, words.boundary)):
            board.set(board.job, word, value)
        frame = _FRAME.pack(_DOWN, self._number, *words, result.replicated_at_gate, result.complete)
        for index, connection in list(self._connections.items()):
            if index != self._parent:
                connection.say(frame)  # hears nothing meanwhile: a child must not get this result after a newer one
        if words.end_at and not board.get(board.job, END_AT):
            board.set(board.job, END_AT, words.end_at)
            self._on_end_at(step_of(words.end_at))
        self._on_result(result)

    # ---- dialling

    def _dial(self, index: int) -> None:
        self._over.set()
        self._over, number = threading.Event(), self._number
        thread = threading.Thread(target=self._connect, args=(index, number, self._over), name="lightning-gemini-mesh", daemon=True)
        self._dialling = [*(thread for thread in self._dialling if thread.is_alive()), thread]
        thread.start()

    def _is_dialling(self) -> bool:
        """In this generation: a thread is about to connect, or has done so, and `_on_dialled` is about to see it."""
        trying = bool(self._dialling) and self._dialling[-1].is_alive() and not self._over.is_set()
        return trying or any(number == self._number for number, _, _ in self._dialled)

    def _connect(self, index: int, number: int, over: threading.Event) -> None:
        while not over.is_set():
            try:
                sock = self._dialler.connect_control(index)
            except (OSError, KeyError, RendezvousError):
                over.wait(_RETRY_S)
                continue
            self._dialled.append((number, index, sock))
            with contextlib.suppress(OSError):
                self._ring.send(b"\0")
            return

    def _on_dialled(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._bell.recv(64)
        while self._dialled:
            number, index, sock = self._dialled.pop(0)
            if number == self._number:
                self._add(index, self._nodes[index], sock)
            else:
                sock.close()

    def close(self) -> None:
        """Close all connections, join the threads."""
        self._over.set()
        for thread in self._dialling:
            thread.join(_JOIN_S)
        self._number = -1
        self._on_dialled()
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(self._bell)
        self._bell.close()
        self._ring.close()
