"""The roster: where each rank of a job listens. Every rank computes the same one, so that nobody has to be asked.

Seam: `Roster.on_one_node` and `Roster.on_hosts` build it from what a launcher tells its processes (see `detect`); `PeerNode` binds the
first free candidate of its own rank and tries a peer's candidates in order.

Ranks of one node meet at abstract unix sockets: no port can be taken, two jobs never see each other, and the kernel vouches for the
peer's user. Ranks of several nodes meet at TCP ports from a range derived from the job's name, several candidates each.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

CANDIDATES = 4
"""Ports a rank may listen at: with each one more, a port that somebody else has taken matters less."""
_FIRST_PORT, _LAST_PORT = 16384, 32000
"""Below Linux's ephemeral ports (32768 and more), which outgoing connections take at random."""


@dataclass(frozen=True, slots=True)
class Address:
    """A TCP address, or (`port` is 0) an abstract unix socket named `host`."""

    host: str
    port: int = 0

    @property
    def is_unix(self) -> bool:
        """Whether it is a unix socket."""
        return self.port == 0

    def __str__(self) -> str:
        if self.is_unix:
            return f"unix socket @{self.host}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Roster:
    """Candidates of every rank, by rank. `job` names the job in every handshake."""

    job: str
    addresses: tuple[tuple[Address, ...], ...]

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.addresses)

    @property
    def local(self) -> bool:
        """Whether no rank can be reached from another machine."""
        return all(address.is_unix or is_loopback(address.host) for candidates in self.addresses for address in candidates)

    @classmethod
    def on_one_node(cls, job: str, size: int) -> Roster:
        """Ranks of one node. Raises `ValueError` for a world without ranks."""
        _require_ranks(size)
        return cls(job, tuple((Address(f"lightning-gemini.{_digest(job)}.{rank}"),) for rank in range(size)))

    @classmethod
    def on_hosts(cls, job: str, hosts: Sequence[str], ranks_per_host: int, port: int | None = None) -> Roster:
        """Ranks 0 … ranks_per_host-1 on the first host, and so on; `port` is the first port of each host.

        Raises `ValueError` for an empty or repeated host and for ports that do not fit.
        """
        _require_ranks(ranks_per_host * len(hosts))
        names = [host.strip().removeprefix("[").removesuffix("]") for host in hosts]
        for name in names:
            if not name or names.count(name) > 1:
                raise ValueError(f"rendezvous.hosts={list(hosts)} is not valid: {name!r} is {'empty' if not name else 'named twice'}")
        span = CANDIDATES * ranks_per_host
        first = derived_port(job, span) if port is None else port
        if not 0 < first <= 65536 - span:
            raise ValueError(
                f"rendezvous.port={first} is not valid: {ranks_per_host} ranks on a host need the {span} ports from it up; "
                f"choose one between 1024 and {65536 - span}"
            )
        return cls(
            job,
            tuple(
                tuple(Address(host, first + attempt * ranks_per_host + local) for attempt in range(CANDIDATES))
                for host in names
                for local in range(ranks_per_host)
            ),
        )


def derived_port(job: str, span: int) -> int:
    """First port of a job: the same in all its processes, another in the next job. `span` ports from it on are used."""
    room = max(1, _LAST_PORT - _FIRST_PORT - span)
    return _FIRST_PORT + int(_digest(job), 16) % room


def is_loopback(host: str) -> bool:
    """Whether an address in numbers, or "localhost", stays on this machine; other names may be anywhere."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _digest(job: str) -> str:
    return hashlib.blake2b(job.encode(), digest_size=8).hexdigest()


def _require_ranks(count: int) -> None:
    if count < 1:
        raise ValueError(f"a job needs at least one rank, not {count}")
