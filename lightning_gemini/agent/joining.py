"""How a node joins a job of several: etcd for who is there and what is decided, an exchange for the bytes, a mesh for the votes.

Seam: `through_etcd(cluster, options) -> Join`. What can fail fails here, before a process is started, with one error.
"""

from __future__ import annotations

import hashlib
import os
import selectors
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from urllib.parse import urlsplit

from lightning_gemini.agent.cluster import Cluster
from lightning_gemini.agent.decision import decide
from lightning_gemini.agent.job import Job, Join
from lightning_gemini.agent.mesh import Mesh
from lightning_gemini.agent.node import Node
from lightning_gemini.agent.others import Others
from lightning_gemini.config import MembershipConfig
from lightning_gemini.membership.etcd import EtcdMembership
from lightning_gemini.membership.records import NodeInfo
from lightning_gemini.replication.exchange import Exchange


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What all nodes of a job are started with."""

    membership: MembershipConfig
    token: bytes = b""
    """The job's secret."""
    script: Sequence[str] = ()
    """The command line of a rank."""


def through_etcd(cluster: Cluster, options: Options) -> Join:
    """Join the job of `cluster` in the etcd of `options`. Raises `ValueError`, `ConnectionError` when it is called."""

    def join(node: Node, selector: selectors.BaseSelector) -> Job:
        name = f"{cluster.host or socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
        others = Others(node.say)
        membership = _membership(options.membership, cluster, node)
        node.coordinator.membership = membership
        node.coordinator.lost_step = -1 if cluster.lost_step is None else cluster.lost_step
        host = cluster.host or _address_towards(options.membership.etcd[0])
        others.exchange = Exchange(job=cluster.job, token=options.token, node=name, host=host, observer=others)
        others.mesh = Mesh(others.exchange, selector, membership.suspect, node.end_after)
        node.coordinator.others = others
        selector.register(others.exchange, selectors.EVENT_READ, others.poll)
        membership.join(
            NodeInfo(
                node=name,
                host=host,
                port=others.exchange.port,
                ranks_per_node=node.ranks_per_node,
                domain=cluster.domain,
                preferred=cluster.node_rank,
                spare=cluster.spare,
                again=cluster.lost_step is not None,
                token=hashlib.blake2b(cluster.job.encode(), key=options.token[:64], digest_size=8).hexdigest(),
                script=_digest(options.script),
            )
        )
        return Job(cluster.job, name, options.token.decode(), log_name=f"agent-{name}")

    return join


def _membership(config: MembershipConfig, cluster: Cluster, node: Node) -> EtcdMembership:
    environ = os.environ
    return EtcdMembership(
        config.etcd,
        cluster.job,
        cluster.nnodes,
        decide,
        node,
        ca=config.ca or environ.get("ETCD_CACERT"),
        cert=config.cert or environ.get("ETCD_CERT"),
        key=config.key or environ.get("ETCD_KEY"),
        user=config.user or environ.get("ETCD_USER", ""),
        password=environ.get("ETCD_PASSWORD", ""),
        lease_ttl_s=config.lease_ttl_s,
        join_timeout_s=config.join_timeout_s,
        vacancy_timeout_s=config.vacancy_timeout_s,
    )


def _digest(script: Sequence[str]) -> str:
    """Of the command line and the package's version: all nodes run the same. The interpreter's path may differ."""
    words = [version("lightning_gemini"), *(script[1:] if script[:1] == [sys.executable] else script)]
    return hashlib.blake2b("\0".join(words).encode(), digest_size=8).hexdigest()


def _address_towards(url: str) -> str:
    """This node's address, in numbers, on the way to an etcd. Raises `ConnectionError`."""
    where = urlsplit(url)
    try:
        family, _, _, _, address = socket.getaddrinfo(where.hostname, where.port or 2379, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect(address)  # sends nothing
            return str(sock.getsockname()[0])
    except OSError as error:
        raise ConnectionError(f"membership.etcd={url!r}: no way to it ({error.strerror or error})") from None
