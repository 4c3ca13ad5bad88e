"""Finding addresses: bind the first free candidate of our own rank; dial a peer's candidates until one proves to be that peer.

Names are looked up forwards only (a reverse look-up can hang for seconds where DNS does not answer for private addresses), in a thread,
with a deadline, and again at the next attempt, because a peer's name may appear in DNS after the peer.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
from typing import TYPE_CHECKING

from lightning_gemini.peers import wire
from lightning_gemini.peers.connection import Dialler, Owner
from lightning_gemini.peers.errors import DuplicateRank, RendezvousError, Unreachable
from lightning_gemini.peers.roster import Address, is_loopback

if TYPE_CHECKING:
    from lightning_gemini.peers.node import PeerNode

CONNECT_S = 3.0
_LOOKUP_S = 10.0
_BACKLOG = 4096


class Resolver:
    """Forward look-ups of one node; what was found is kept."""

    def __init__(self) -> None:
        self._found: dict[str, str] = {}

    async def find(self, host: str) -> str:
        """A host's address in numbers. Raises `OSError`."""
        if _in_numbers(host):
            return host  # a look-up would start a thread
        if host not in self._found:
            lookup = asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
            try:
                answers = await asyncio.wait_for(lookup, _LOOKUP_S)
            except asyncio.TimeoutError:
                raise OSError(f"looking up {host!r} took more than {_LOOKUP_S:g} s") from None
            self._found[host] = str(answers[0][4][0])
        return self._found[host]


def _in_numbers(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


async def bind(node: PeerNode) -> tuple[socket.socket, Address]:
    """Listen at the first candidate that is free. Raises `DuplicateRank` or `Unreachable`."""
    if node.listening is not None:
        node.listening.setblocking(False)
        node.listening.listen(_BACKLOG)
        return node.listening, node.roster.addresses[node.rank][0]
    problems = []
    for address in node.roster.addresses[node.rank]:
        try:
            return await _listen(node, address), address
        except OSError as error:
            problems.append(f"{address}: {error.strerror or error}")
            if error.errno == errno.EADDRINUSE and await _is_taken_by_us(node, address):
                raise DuplicateRank(
                    f"rank {node.rank} of job {node.roster.job!r} is running already at {address}: give each process a rank of its own"
                ) from None
    raise Unreachable(
        f"rank {node.rank} of job {node.roster.job!r} can listen nowhere ({'; '.join(problems)}): set rendezvous.port or rendezvous.hosts"
    )


async def _listen(node: PeerNode, address: Address) -> socket.socket:
    family, where = await resolve(node.resolver, address)
    if isinstance(where, tuple) and is_loopback(where[0]) and not node.roster.local:
        where = ("::" if family == socket.AF_INET6 else "0.0.0.0", where[1])  # Debian maps a host's own name to 127.0.1.1
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        if not address.is_unix:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


async def _is_taken_by_us(node: PeerNode, address: Address) -> bool:
    answer = _Answer()
    try:
        dialler = await connect(node, node.rank, node.generation, address, answer)
    except (OSError, asyncio.TimeoutError):
        return False
    error = await answer.error
    dialler.close("asked")
    return isinstance(error, DuplicateRank)


class _Answer:
    """What whoever has our address says to a Hello."""

    def __init__(self) -> None:
        self.error: asyncio.Future[RendezvousError | None] = asyncio.get_running_loop().create_future()

    def welcomed(self) -> None:
        """A listener of our rank would not; see `PeerNode`."""
        self.error.set_result(None)

    def answered(self, reply: wire.Reply) -> None:
        """Nothing was asked."""

    def ended(self, error: RendezvousError) -> None:
        """Refused, most likely."""
        if not self.error.done():
            self.error.set_result(error)


async def resolve(resolver: Resolver, address: Address) -> tuple[socket.AddressFamily, tuple[str, int] | str]:
    """Family and what `socket.connect` takes."""
    if address.is_unix:
        return socket.AF_UNIX, "\0" + address.host
    host = await resolver.find(address.host)
    return socket.AF_INET6 if ":" in host else socket.AF_INET, (host, address.port)


async def connect(node: PeerNode, rank: int, generation: int, address: Address, owner: Owner) -> Dialler:
    """A connection on which the handshake is under way. Raises `OSError`, `asyncio.TimeoutError`."""
    family, where = await resolve(node.resolver, address)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        if family == socket.AF_UNIX:
            sock.connect(where)  # at once or not at all
        else:
            await asyncio.wait_for(asyncio.get_running_loop().sock_connect(sock, where), CONNECT_S)
    except BaseException:
        sock.close()
        raise
    hello = wire.Hello(job=node.roster.job, generation=generation, rank=node.rank, to=rank, process=node.process, nonce=wire.nonce())
    return Dialler(sock, node.token, hello, owner)
