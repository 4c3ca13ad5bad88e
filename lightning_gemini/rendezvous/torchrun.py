"""`torchrun --rdzv-backend=gemini`: torchrun's own agents without a TCPStore.

Seam: torch's `RendezvousHandler`, found through the entry point `torchrun.handlers`. Use:
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend gemini --rdzv-endpoint node0,node1 train.py
Each agent finds its own place in the list (or is told: `--rdzv-conf rank=1`), and tells its workers the hosts and the job, so that a script
with `lightning_gemini.init_process_group` or `init_method="gemini://"` needs no option. One host or none: everything on this node.

States: a round per start of the workers. An agent whose workers fail begins the next round; the others see it in `num_nodes_waiting`, as
torchrun's agents expect, and follow. Failure: a host list without this host, or with another number of hosts, is one error.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable

from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousParameters, RendezvousStoreInfo

from lightning_gemini.config import RendezvousConfig
from lightning_gemini.peers.errors import RendezvousError
from lightning_gemini.peers.node import PeerNode
from lightning_gemini.peers.roster import Roster
from lightning_gemini.rendezvous.detect import token
from lightning_gemini.rendezvous.hostlist import split_hosts
from lightning_gemini.rendezvous.store import PeerStore

_TIMEOUT_S = 600.0
_LEAVE_S = 3.0
"""How long an agent that ends waits for the others to end; after a failure they may not."""


class PeerRendezvous(RendezvousHandler):
    """Agents of one job, one per host, as peers."""

    def __init__(self, roster: Roster, rank: int, run_id: str, host: str, timeout_s: float) -> None:
        self._run_id, self._host = run_id, host
        self._node = PeerNode(roster, rank, token=token(RendezvousConfig(), os.environ), timeout_s=timeout_s)
        self._round = -1
        self._closed = False

    def get_backend(self) -> str:
        """Its name."""
        return "gemini"

    @property
    def use_agent_store(self) -> bool:
        """Workers have no store of the agent's to share."""
        return False

    def next_rendezvous(self) -> RendezvousInfo:
        """All agents meet for the next start of their workers."""
        self._round += 1
        self._node.open(self._round)
        os.environ["LIGHTNING_GEMINI_START"] = str(self._round)  # their own count of restarts differs from host to host
        store = PeerStore(self._node, generation=self._round, prefix=f"{self._run_id}/")
        rank, size = self._node.rank, self._node.roster.size
        self._node.all_gather(self._round, "round", rank, size, b"")
        bootstrap = RendezvousStoreInfo.build(rank, store, local_addr=self._host)
        return RendezvousInfo(PrefixStore("agents", store), rank, size, bootstrap)

    def is_closed(self) -> bool:
        """Whether somebody has closed it."""
        return self._closed

    def set_closed(self) -> None:
        """No further rounds."""
        self._closed = True

    def num_nodes_waiting(self) -> int:
        """How many agents wait in a later round: those have restarted their workers, and so must we."""
        return sum(round_ > self._round for round_ in self._node.ahead.values())

    def get_run_id(self) -> str:
        """Name of the job."""
        return self._run_id

    def shutdown(self) -> bool:
        """Leave, together if possible: torchrun's own barrier at the end is over for one agent while another still asks."""
        with contextlib.suppress(RendezvousError, TimeoutError):
            if self._round >= 0:
                rank, size = self._node.rank, self._node.roster.size
                self._node.all_gather(self._round, "leaving", rank, size, b"", timeout_s=_LEAVE_S)
        self._node.close()
        return True


def create(parameters: RendezvousParameters) -> PeerRendezvous:
    """From torchrun's arguments. Raises `ValueError`."""
    names, port = split_hosts(parameters.endpoint)
    timeout_s = float(parameters.get("timeout", _TIMEOUT_S))
    if parameters.max_nodes == 1:
        _tell_workers([], parameters.run_id)
        alone = Roster.on_one_node(f"torchrun {parameters.run_id} {os.getpid()}", 1)
        return PeerRendezvous(alone, 0, parameters.run_id, "localhost", timeout_s)
    if len(names) != parameters.max_nodes or parameters.min_nodes != parameters.max_nodes:
        raise ValueError(
            f"--rdzv-endpoint={parameters.endpoint!r} names {len(names)} hosts, --nnodes is {parameters.min_nodes}:{parameters.max_nodes}: "
            "name every host of the job once, in the order of their ranks, as in --nnodes 2 --rdzv-endpoint node0,node1"
        )
    rank = int(parameters.get("rank", -1))
    if rank >= len(names):
        raise ValueError(f"--rdzv-conf rank={rank} is not a place among the hosts {names}: give 0 to {len(names) - 1}, or leave it out")
    rank = rank if rank >= 0 else _own_place(names)
    _tell_workers(names, parameters.run_id)
    roster = Roster.on_hosts(f"torchrun {parameters.run_id}", names, 1, port)
    return PeerRendezvous(roster, rank, parameters.run_id, names[rank], timeout_s)


def entry_point() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """What torch's registry asks for."""
    return create


def _tell_workers(hosts: list[str], run_id: str) -> None:
    os.environ["LIGHTNING_GEMINI_HOSTS"] = ",".join(hosts)
    if run_id and run_id != "none":
        os.environ["LIGHTNING_GEMINI_JOB"] = run_id
    else:
        os.environ.setdefault("LIGHTNING_GEMINI_JOB", f"torchrun-{os.getpid()}" if not hosts else "torchrun")


def _own_place(hosts: list[str]) -> int:
    """Which of the hosts this is: the one whose address can be bound here."""
    own = [number for number, host in enumerate(hosts) if host in (socket.gethostname(), os.uname().nodename) or _is_ours(host)]
    if len(own) != 1:
        raise ValueError(f"{len(own)} of the hosts {hosts} are this one: say which with --rdzv-conf rank=0")
    return own[0]


def _is_ours(host: str) -> bool:
    try:
        family, kind, _, _, where = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as sock:
            sock.bind(where)
            return True
    except OSError as error:
        if error.errno not in (errno.EADDRNOTAVAIL, None) and not isinstance(error, socket.gaierror):
            raise
        return False
