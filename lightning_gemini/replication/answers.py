"""Connections that other agents make: who is admitted, and what is done with each.

Seam: `admit` and `hand` are called by the door, in its thread; a connection is then answered in a thread of its own until it ends, or its
generation does. Failure: what ends a connection against the rules of the protocol is one line of news; that it ends is the normal thing.
"""

from __future__ import annotations

import functools
import socket

import msgspec

from lightning_gemini.membership.records import VERSION
from lightning_gemini.peers import wire
from lightning_gemini.peers.errors import RendezvousError
from lightning_gemini.replication import messages
from lightning_gemini.replication.arenas import Held
from lightning_gemini.replication.events import Events, Observer
from lightning_gemini.replication.fence import Fence
from lightning_gemini.replication.receiving import Receiver
from lightning_gemini.replication.serving import serve
from lightning_gemini.replication.shelf import Shelf
from lightning_gemini.replication.store import Store
from lightning_gemini.replication.tcp import TcpLane, prepare
from lightning_gemini.replication.threads import Threads


class Answers:
    """See the module's docstring."""

    def __init__(self, job: str, node: str, fence: Fence, events: Events, threads: Threads, held: Held, store: Store, shelf: Shelf) -> None:
        self._job, self._node = job, node
        self._fence, self._events, self._threads = fence, events, threads
        self._held, self._store, self._shelf = held, store, shelf

    def admit(self, words: messages.Hello) -> wire.Refusal | bool:
        """Decide about a proved Hello; False lets it wait: its generation, or its node, will be told to us."""
        members = self._fence.members
        if words.version != VERSION:
            text = f"this is version {VERSION} of the protocol, not {words.version}: use one version of lightning_gemini"
            return wire.Refusal("wrong", text)
        if (words.job, words.to) != (self._job, self._node):
            return wire.Refusal("wrong", f"this is node {self._node!r} of job {self._job!r}")
        if words.generation < members.generation:
            return wire.Refusal("stale", f"generation {words.generation} is over, {members.generation} has begun")
        return words.generation == members.generation and members.index_of(words.node) is not None

    def hand(self, sock: socket.socket, words: messages.Hello) -> None:
        """A welcomed connection."""
        if words.purpose == messages.CONTROL:
            prepare(sock)
            self._events.put(functools.partial(self._control, sock, words), sock)
        else:
            self._threads.start(f"{words.purpose}-of-{words.node}", functools.partial(self._answer, sock, words))

    def _control(self, sock: socket.socket, words: messages.Hello, observer: Observer) -> None:
        members = self._fence.members
        index = members.index_of(words.node)
        if index is None or words.generation != members.generation:
            sock.close()
        else:
            observer.on_control(index, words.node, sock)

    def _answer(self, sock: socket.socket, words: messages.Hello) -> None:
        lane = TcpLane(sock)
        try:
            self._fence.admit(lane, words.generation)
            if words.purpose == messages.PUSH:
                Receiver(lane, self._store, functools.partial(self._fence.current, words.generation)).run()
            elif words.purpose == messages.PULL:
                serve(lane, self._shelf, self._held)
        except ConnectionResetError:
            pass  # the other end has closed it: it has all it wanted, or will connect again
        except (OSError, RendezvousError, msgspec.DecodeError) as error:
            if words.generation == self._fence.members.generation:
                self._events.news(f"the connection of {words.node} ({words.purpose}) has ended: {error}")
        finally:
            self._fence.leave(lane)
            lane.close()
