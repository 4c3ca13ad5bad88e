"""A roster through etcd, for jobs that have one and hosts that nobody can compute: each rank says where it listens.

Seam: `listen_and_tell` binds a free port, creates `/lightning_gemini/<job>/<generation>/ranks/<rank>` once, waits until all ranks have, and
returns the node. etcd is asked only here; keys of groups never go through it. Keys carry a lease, so that a job leaves nothing behind.

Failure: etcd unreachable -> `Unreachable` with its URL; a rank that exists already -> `DuplicateRank`; ranks that do not come ->
`Unreachable` that counts them. Needs the extra `etcd` (etcd3gw, over etcd's HTTP gateway).
"""

from __future__ import annotations

import os
import socket
import time
from typing import Any
from urllib.parse import urlsplit

from lightning_gemini.config import RendezvousConfig
from lightning_gemini.peers.errors import DuplicateRank, Unreachable
from lightning_gemini.peers.node import PeerNode
from lightning_gemini.peers.roster import Address, Roster, is_loopback
from lightning_gemini.peers.wire import require_token
from lightning_gemini.rendezvous.detect import Place

_REQUEST_S = 5
_PAUSE_S = 0.1
_SPARE_LEASE_S = 60


def listen_and_tell(config: RendezvousConfig, here: Place, token: bytes) -> PeerNode:
    """A node of this rank whose roster came through etcd."""
    assert config.etcd is not None
    url = urlsplit(config.etcd)
    own = _own_address(url.hostname or "localhost", url.port or 2379)
    if not is_loopback(own):
        require_token(token)
    listening = _bind(own)
    try:
        roster = _exchange(_client(config), config, here, listening.getsockname()[:2])
        return PeerNode(roster, here.rank, token=token, generation=here.generation, timeout_s=config.timeout_s, listening=listening)
    except BaseException:
        listening.close()
        raise


def _client(config: RendezvousConfig) -> Any:
    try:
        from etcd3gw.client import Etcd3Client
    except ImportError:
        raise ValueError(f"rendezvous.etcd={config.etcd!r} needs a client: pip install 'lightning_gemini[etcd]'") from None
    url = urlsplit(config.etcd or "")
    return Etcd3Client(
        str(url.hostname),
        url.port or 2379,
        str(url.scheme),
        ca_cert=os.environ.get("ETCD_CACERT"),
        cert_cert=os.environ.get("ETCD_CERT"),
        cert_key=os.environ.get("ETCD_KEY"),
        timeout=_REQUEST_S,
        api_path="/v3/",
    )


def _own_address(host: str, port: int) -> str:
    """The address of this host on the way to etcd, in numbers."""
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect(where)  # sends nothing
            return str(sock.getsockname()[0])
    except OSError as error:
        raise Unreachable(f"rendezvous.etcd: no way to {host}:{port} ({error.strerror or error})") from None


def _bind(host: str) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.bind((host, 0))
    return sock


def _exchange(client: Any, config: RendezvousConfig, here: Place, where: tuple[str, int]) -> Roster:
    prefix = f"/lightning_gemini/{here.job}/{here.generation}/ranks/"
    try:
        lease = client.lease(ttl=int(config.timeout_s) + _SPARE_LEASE_S)
        if not client.create(f"{prefix}{here.rank}", f"{where[0]} {where[1]}", lease):
            raise DuplicateRank(
                f"rank {here.rank} of job {here.job!r} is in etcd already: give each process a rank, and each job a name, of its own"
            )
        return _gather(client, prefix, config, here)
    except (OSError, _errors()) as error:
        raise Unreachable(f"etcd at {config.etcd} does not answer ({error}): is rendezvous.etcd right?") from None


def _gather(client: Any, prefix: str, config: RendezvousConfig, here: Place) -> Roster:
    deadline = time.monotonic() + config.timeout_s
    while True:
        told = {int(meta["key"].decode().removeprefix(prefix)): value.decode().split() for value, meta in client.get_prefix(prefix)}
        if len(told) >= here.world:
            return Roster(here.job, tuple((Address(told[rank][0], int(told[rank][1])),) for rank in range(here.world)))
        if time.monotonic() > deadline:
            missing = sorted({*range(here.world)} - {*told})
            raise Unreachable(f"{len(missing)} of {here.world} ranks did not appear in etcd within {config.timeout_s:g} s: {missing[:8]}")
        time.sleep(_PAUSE_S)


def _errors() -> type[Exception]:
    from etcd3gw.exceptions import Etcd3Exception

    return Etcd3Exception
