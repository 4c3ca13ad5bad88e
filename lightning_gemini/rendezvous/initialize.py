"""Process groups of stock torch without a TCPStore: the first tier of adoption, with any strategy or none.

Three ways in, one path: `init_process_group(…)` in a script; `init_method="gemini://"` in torch's own; `use_peer_rendezvous(…)`, after
which every `torch.distributed.init_process_group` of this process that names no store or init_method of its own comes here (Lightning's
DDP, NeMo, Megatron). The groups are torch's own gloo and NCCL; only where they find each other is ours.

States: one `PeerNode` per process, made at the first use, closed when the interpreter ends. A second initialisation (after
`destroy_process_group`) uses the same node under a new prefix, so that no key is used twice. Failure: one error, before torch starts.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from lightning_gemini.config import RendezvousConfig, parse
from lightning_gemini.peers.node import PeerNode
from lightning_gemini.rendezvous import detect
from lightning_gemini.rendezvous.hostlist import split_hosts
from lightning_gemini.rendezvous.store import PeerStore

_HOSTS_FILE = Path("/etc/hosts")


class _Process:
    """What this process has of it."""

    node: PeerNode | None = None
    starts = 0
    config = RendezvousConfig()


def init_process_group(backend: str | None = None, *, rank: int = -1, world_size: int = -1, **options: Any) -> None:
    """`torch.distributed.init_process_group` with a rendezvous among peers.

    Args:
        backend, rank, world_size: as torch's; rank and world size come from the launcher when they are not given.
        options: fields of `RendezvousConfig` (hosts, port, job, timeout_s, token_file, etcd), and torch's own keyword arguments.

    Raises:
        ValueError: something about the place of this process in the job is missing or wrong; says what to set.
        RendezvousError: a peer cannot be reached, this rank is taken, the job has been restarted meanwhile.
    """
    names = RendezvousConfig.__dataclass_fields__
    config = parse(RendezvousConfig, {key: options.pop(key) for key in [*options] if key in names}, "rendezvous")
    store, rank, world_size = meet(config, rank, world_size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, **options)


def meet(config: RendezvousConfig, rank: int = -1, world_size: int = -1) -> tuple[Store, int, int]:
    """A store among the ranks of this job, with this process's rank and the world's size."""
    here = detect.place(config, os.environ, rank, world_size, _HOSTS_FILE.read_text() if _HOSTS_FILE.exists() else "")
    if _Process.node is None:
        _Process.node = _listen(config, here)
        atexit.register(leave)
    node = _Process.node
    if (node.roster.job, node.rank, node.roster.size) != (here.job, here.rank, here.world):
        raise ValueError(
            f"this process is rank {node.rank} of {node.roster.size} in job {node.roster.job!r} already and cannot become rank {here.rank} "
            f"of {here.world} in {here.job!r}: call lightning_gemini.rendezvous.initialize.leave() first"
        )
    _Process.starts += 1
    return PeerStore(node, prefix=f"{_Process.starts}/"), here.rank, here.world


def _listen(config: RendezvousConfig, here: detect.Place) -> PeerNode:
    token = detect.token(config, os.environ)
    if config.etcd is not None:
        from lightning_gemini.rendezvous.etcd import listen_and_tell

        return listen_and_tell(config, here, token)
    return PeerNode(here.roster(config.port), here.rank, token=token, generation=here.generation, timeout_s=config.timeout_s)


def leave() -> None:
    """Stop listening; the next initialisation of this process starts anew."""
    node, _Process.node = _Process.node, None
    if node is not None:
        node.close()


def _handler(url: str, timeout: Any = None, **_: Any) -> Iterator[tuple[Store, int, int]]:
    """`gemini://[host,host,…][:port]?…` for torch, which adds rank and world_size to the query where it knows them."""
    parts = urlsplit(url)
    query = {key: values[0] for key, values in parse_qs(parts.query).items()}
    hosts, port = split_hosts(parts.netloc)
    given: dict[str, Any] = {"hosts": hosts or None, "port": port}
    options = dataclasses.asdict(_Process.config) | {key: value for key, value in given.items() if value is not None}
    config = parse(RendezvousConfig, options, "rendezvous")
    yield meet(config, int(query.get("rank", -1)), int(query.get("world_size", -1)))


def use_peer_rendezvous(**options: Any) -> None:
    """Make every later `torch.distributed.init_process_group` of this process that names neither store nor init_method meet its peers.

    For code that initialises torch by itself, such as Lightning's strategies and NeMo. `options` are fields of `RendezvousConfig`.
    """
    _Process.config = parse(RendezvousConfig, options, "rendezvous")
    if getattr(dist.init_process_group, "lightning_gemini", False):
        return
    original: Callable[..., None] = dist.init_process_group

    @functools.wraps(original)
    def init_process_group(backend: str | None = None, init_method: str | None = None, *args: Any, **kwargs: Any) -> None:
        store = args[3] if len(args) > 3 else kwargs.get("store")
        if init_method in (None, "env://") and store is None:
            init_method = "gemini://"
        original(backend, init_method, *args, **kwargs)

    init_process_group.lightning_gemini = True  # type: ignore[attr-defined]
    dist.init_process_group = dist.distributed_c10d.init_process_group = init_process_group


def register() -> None:
    """Make torch know `gemini://`."""
    with contextlib.suppress(RuntimeError):  # an earlier import has
        dist.register_rendezvous_handler("gemini", _handler)  # type: ignore[attr-defined, no-untyped-call]
