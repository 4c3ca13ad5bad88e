"""Connections of the mesh that break, come late, or are of another membership by the time they are looked at. Real sockets, one loop."""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from lightning_gemini.agent.memory import BOUNDARY, Board, NodeFiles, create_files, tag
from lightning_gemini.agent.mesh import _FRAME, _UP, Mesh
from lightning_gemini.agent.votes import Words
from lightning_gemini.peers.errors import Unreachable

_LIMIT_S = 10.0


class Late:
    """The parent is not there when it is dialled for the first time."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.calls = sock, 0

    def connect_control(self, index: int) -> socket.socket:
        self.calls += 1
        if self.calls == 1:
            raise Unreachable("nobody has opened this generation yet")
        return self.sock


class Site:
    """A node's mesh in a loop."""

    def __init__(self) -> None:
        self.selector, self.files, self.lost = selectors.DefaultSelector(), create_files(1), list[str]()
        self.board = Board(self.files.board, 1, alone=False)
        self.ours, self.theirs = socket.socketpair()
        self.dialler = Late(self.ours)
        self.mesh = Mesh(self.dialler, self.selector, self.lost.append, lambda _: None)

    def run_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _LIMIT_S
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            for key, _ in self.selector.select(0.05):
                key.data()

    def close(self) -> None:
        self.mesh.close()
        self.theirs.close()
        self.ours.close()
        self.board.close()
        NodeFiles.close(self.files)
        self.selector.close()


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.close()


def up(number: int, boundary: int) -> bytes:
    return _FRAME.pack(_UP, number, *Words(boundary=tag(number, boundary)), 0, 0)


def test_a_connection_that_was_closed_by_what_was_ready_before_it(site: Site) -> None:
    """A loss and the generation that follows it are often told at once."""
    site.mesh.open(0, 0, ["a", "b"], site.board)
    site.mesh.accept(1, "b", site.ours)
    site.theirs.close()
    ready = site.selector.select(_LIMIT_S)
    site.mesh.open(1, 0, ["a", "c"], site.board)
    assert ready
    for key, _ in ready:
        key.data()
    assert not site.lost


def test_a_parent_is_dialled_once_while_vacant_places_are_filled(site: Site) -> None:
    """Of two connections each end might keep another one."""
    site.dialler.calls = 1
    site.mesh.open(0, 1, ["a", "b", ""], site.board)
    site.mesh.open(0, 1, ["a", "b", "c"], site.board)
    site.run_until(lambda: len(site.mesh._connections) == 1)
    assert site.dialler.calls == 2


def test_no_child_hears_an_older_result_after_a_newer_one(site: Site) -> None:
    """Two words of one child arrive at once: the result of the second must be the last that the other child gets."""
    other, theirs = socket.socketpair()
    site.mesh.open(0, 0, ["a", "b", "c"], site.board)
    site.mesh.accept(1, "b", site.ours)
    site.mesh.accept(2, "c", other)
    site.mesh.own(Words(boundary=tag(0, 5)))
    theirs.sendall(up(0, 5))
    site.theirs.sendall(up(0, 1) + up(0, 2))
    site.run_until(lambda: site.board.get(site.board.job, BOUNDARY) == tag(0, 2))
    theirs.setblocking(False)
    heard = theirs.recv(1 << 16)
    assert _FRAME.unpack(heard[-_FRAME.size :])[2] == tag(0, 2)
    theirs.close()


def test_a_parent_that_is_late_is_dialled_again(site: Site) -> None:
    site.mesh.open(0, 1, ["a", "b"], site.board)
    site.theirs.settimeout(_LIMIT_S)
    site.run_until(lambda: site.dialler.calls == 2 and len(site.mesh._connections) == 1)
    site.mesh.own(Words(boundary=tag(0, 1)))
    assert site.theirs.recv(_FRAME.size)[:1] == bytes([_UP])


def test_what_a_child_has_said_still_counts_when_vacant_places_are_filled(site: Site) -> None:
    """A child may be told sooner that they are, and says its words once."""
    site.mesh.open(1, 0, ["a", "b", ""], site.board)
    site.mesh.accept(1, "b", site.ours)
    site.theirs.send(up(1, 3))
    assert site.mesh._votes is not None
    votes = site.mesh._votes
    site.run_until(lambda: votes._words[1].boundary == tag(1, 3))
    site.mesh.open(1, 0, ["a", "b", "c"], site.board)
    ours, theirs = socket.socketpair()
    site.mesh.accept(2, "c", ours)
    theirs.send(up(1, 4))
    site.mesh.own(Words(boundary=tag(1, 5)))
    site.run_until(lambda: site.board.get(site.board.job, BOUNDARY) == tag(1, 3))
    theirs.close()
