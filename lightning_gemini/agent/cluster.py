"""Which node of which job is this: what launchers tell a process that becomes an agent, as one `Cluster`.

Seam: `cluster(environ, …)` is a pure function of options and environment. Arguments win over LIGHTNING_GEMINI_NODES, _JOB and _DOMAIN,
these over the launcher, the launcher over the default of one node. Known: torchrun, Slurm, Kubernetes Indexed Job (JobSet, TrainJob), and
plain NODE_RANK. It is `rendezvous.detect` for agents: nodes instead of ranks, and etcd knows the hosts.

A launcher may start one process on each node or one for each rank: the one with `local_rank` 0 becomes the agent, which starts all ranks of
its node; the others wait for it. It may start more nodes than the world has: those from `nnodes` on have no place of their own, wait as
spares, and take the place of a node that does not come.

Failure: what is missing or contradictory is one `ValueError` that names the option, or the variable, and says what to set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A node's place in its job."""

    nnodes: int
    """Nodes of the world, spares not counted."""
    ranks_per_node: int
    node_rank: int = -1
    """Place among the nodes that the launcher gave it; -1 for none: beyond `nnodes`, a spare, or started by hand."""
    job: str = ""
    """The same on all nodes and in no other job; may be empty on one node."""
    local_rank: int = 0
    """Which of the processes that the launcher started on this node; 0 becomes the agent."""
    waiting: int = 0
    """How many of those wait for the agent."""
    domain: str = ""
    """Failure domain (rack, switch, zone); empty: the node is its own."""
    host: str = ""
    """Address at which the others reach this node; empty: the one from which it reaches etcd."""
    spare: bool = False
    """Asked to take part only in place of a node that is lost."""
    lost_step: int | None = None
    """It was in this job before and was expelled, when its ranks had completed this step (-1: none); None: it comes for the first time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Start:
    """What a launcher tells a process."""

    by: str
    nodes: int = 0
    """On how many it has started processes; 0 if it does not tell."""
    node: int = -1
    processes: int = 0
    """On each node; 0 if it does not tell."""
    local: int = 0
    job: str = ""


def cluster(
    environ: Mapping[str, str],
    *,
    nnodes: int | None = None,
    nproc_per_node: int | None = None,
    node_rank: int | None = None,
    job: str | None = None,
    host: str | None = None,
    domain: str | None = None,
    spare: bool = False,
) -> Cluster:
    """This node's place. The arguments are the options of `lightning-gemini run`; None for one that was not given. Raises `ValueError`."""
    start = _torchrun(environ) or _slurm(environ, nnodes) or _pod(environ) or _by_hand(environ)
    if not -1 <= start.node < (start.nodes or start.node + 1) or not 0 <= start.local < (start.processes or start.local + 1):
        raise ValueError(
            f"{start.by} contradicts itself: node {start.node} of {start.nodes}, process {start.local} of {start.processes}; "
            "start the processes with torchrun or srun, or unset its variables"
        )
    name = job or environ.get("LIGHTNING_GEMINI_JOB")
    nodes = _nodes(environ, nnodes, start, bool(name))
    if nodes > 1 and not (name or start.job):
        raise ValueError(f"--nnodes={nodes}, but nobody has named the job: give --job (or LIGHTNING_GEMINI_JOB), the same on all nodes")
    return Cluster(
        nnodes=nodes,
        ranks_per_node=_ranks_per_node(nproc_per_node, start),
        node_rank=_node_rank(node_rank, nodes, start, spare),
        job=name or start.job,
        local_rank=start.local,
        waiting=max(0, start.processes - 1),
        domain=domain or environ.get("LIGHTNING_GEMINI_DOMAIN") or _switch(environ),
        host=host or "",
        spare=spare,
    )


def _nodes(environ: Mapping[str, str], given: int | None, start: _Start, named: bool) -> int:
    nodes = given if given is not None else _number(environ, "LIGHTNING_GEMINI_NODES", start.nodes or (1 if start.node < 0 else 0))
    if given is None and nodes == 0:
        raise ValueError(f"--nnodes is missing: this is node {start.node}, and {start.by} tells of how many; give it, without the spares")
    if nodes < 1:
        raise ValueError(f"--nnodes={nodes} is not valid: give the number of nodes of the world, 1 or more")
    if 0 < start.nodes < nodes and not named:  # named: it joins nodes that were started apart from it
        raise ValueError(
            f"--nnodes={nodes}, but {start.by} has started {start.nodes}: start as many nodes, or more for spares; to join a job that "
            "was started elsewhere, name it with --job"
        )
    return nodes


def _node_rank(given: int | None, nodes: int, start: _Start, spare: bool) -> int:
    if given is None:  # the numbers of a launcher that has started fewer nodes than the world has are its own
        return -1 if spare or start.node >= nodes or 0 < start.nodes < nodes else start.node
    if spare or not 0 <= given < nodes:
        remedy = "leave it out for a spare" if spare else f"give 0 to {nodes - 1}, or leave it out"
        raise ValueError(f"--node-rank={given} is not a place {'of a spare' if spare else f'among {nodes} nodes'}: {remedy}")
    return given


def _ranks_per_node(given: int | None, start: _Start) -> int:
    ranks = start.processes if given is None else given
    if ranks < 1:
        what = " is missing" if given is None else f"={given} is not valid"
        raise ValueError(f"--nproc-per-node{what}: give the number of ranks on each node, as the Trainer's devices")
    if start.processes not in (0, 1, ranks):
        raise ValueError(
            f"--nproc-per-node={ranks}, but {start.by} has started {start.processes} processes on each node: start one on each, or {ranks}"
        )
    return ranks


def _torchrun(environ: Mapping[str, str]) -> _Start | None:
    if not environ.get("GROUP_RANK"):
        return None
    job = f"{environ.get('TORCHELASTIC_RUN_ID', '')}@{environ.get('MASTER_ADDR', '')}:{environ.get('MASTER_PORT', '')}"
    return _Start(
        by="torchrun",
        nodes=_number(environ, "GROUP_WORLD_SIZE"),
        node=_number(environ, "GROUP_RANK"),
        processes=_number(environ, "LOCAL_WORLD_SIZE"),
        local=_number(environ, "LOCAL_RANK"),
        job=job,
    )


def _slurm(environ: Mapping[str, str], nnodes: int | None) -> _Start | None:
    if not environ.get("SLURM_JOB_ID"):
        return None
    if not environ.get("SLURM_STEP_NUM_NODES"):  # a batch script, or a shell: Slurm has started nothing on the other nodes
        if _number(environ, "SLURM_NNODES", 1) > 1 and nnodes != 1:
            raise ValueError(
                f"SLURM_NNODES={environ['SLURM_NNODES']}, but srun has not started this process: put srun before the command, which starts "
                "it on each node, or give --nnodes 1"
            )
        return None
    nodes, tasks = _number(environ, "SLURM_STEP_NUM_NODES"), _number(environ, "SLURM_STEP_NUM_TASKS", 0)
    if nodes < 1 or tasks % nodes:
        raise ValueError(f"srun has started {tasks} tasks on {nodes} nodes: start as many on each, with --ntasks-per-node")
    restarts = environ.get("SLURM_RESTART_COUNT", "0")
    again = "" if restarts == "0" else f"-{restarts}"  # what the job left in etcd before it was requeued is not its own any more
    return _Start(
        by="srun",
        nodes=nodes,
        node=_number(environ, "SLURM_NODEID"),
        processes=tasks // nodes,
        local=_number(environ, "SLURM_LOCALID"),
        job=f"slurm-{environ['SLURM_JOB_ID']}.{environ.get('SLURM_STEP_ID', '0')}{again}",
    )


def _pod(environ: Mapping[str, str]) -> _Start | None:
    """Kubernetes does not tell how many pods there are."""
    if not environ.get("JOB_COMPLETION_INDEX"):
        return None
    stem = environ.get("HOSTNAME", "").partition(".")[0].rpartition("-")[0]
    return _Start(by="Kubernetes", node=_number(environ, "JOB_COMPLETION_INDEX"), job=stem and f"pods-{stem}")


def _by_hand(environ: Mapping[str, str]) -> _Start:
    return _Start(by="nobody", node=_number(environ, "NODE_RANK", -1))


def _switch(environ: Mapping[str, str]) -> str:
    """The leaf of Slurm's topology above this node: `core.rack7.node12` -> `rack7`. The pattern counts, as a node's name may have dots."""
    kinds = environ.get("SLURM_TOPOLOGY_ADDR_PATTERN", "").split(".")
    parts = environ.get("SLURM_TOPOLOGY_ADDR", "").split(".", len(kinds) - 1)
    return parts[-2] if len(parts) == len(kinds) > 1 and kinds[-1] == "node" else ""


def _number(environ: Mapping[str, str], key: str, otherwise: int | None = None) -> int:
    text = environ.get(key)
    if not text and otherwise is not None:
        return otherwise
    try:
        return int(text or "")
    except ValueError:
        raise ValueError(f"{key}={text!r} is not a number: its launcher sets it, unset it where there is none") from None
