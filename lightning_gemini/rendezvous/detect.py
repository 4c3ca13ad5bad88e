"""Who am I and where are the others: what launchers tell their processes, as one `Place`.

Seam: `place(config, environ, …)` is a pure function of options and environment (and of the names in /etc/hosts). Explicit arguments win
over the environment, the environment over guesses. Known: torchrun, Slurm, Kubernetes Indexed Job and JobSet, Lightning's own launcher, and
plain RANK and WORLD_SIZE. Failure: whatever is missing or contradictory is one `ValueError` that says what to set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_gemini.config import RendezvousConfig
from lightning_gemini.peers import secret
from lightning_gemini.peers.roster import Roster, is_loopback
from lightning_gemini.rendezvous import hostlist

_RANK = ("RANK", "SLURM_PROCID", "JOB_COMPLETION_INDEX")
_WORLD = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "LIGHTNING_GEMINI_PODS")
_RESTARTS = ("LIGHTNING_GEMINI_START", "SLURM_RESTART_COUNT")


@dataclass(frozen=True, slots=True)
class Place:
    """A process's place in its job."""

    job: str
    rank: int
    world: int
    hosts: tuple[str, ...]
    """In the order of ranks; empty when all ranks are on this node."""
    generation: int
    """Restarts of the whole job so far: a process of an earlier start is refused."""

    def roster(self, port: int | None) -> Roster:
        """Everybody's addresses. Raises `ValueError` for ranks that are not spread evenly."""
        if not self.hosts and port is None:
            return Roster.on_one_node(self.job, self.world)
        hosts = self.hosts or ("127.0.0.1",)
        if self.world % len(hosts):
            raise ValueError(
                f"{self.world} ranks cannot be spread evenly over the {len(hosts)} hosts {', '.join(hosts[:4])}…: "
                "start as many ranks on each, or name the hosts with rendezvous.hosts"
            )
        return Roster.on_hosts(self.job, hosts, self.world // len(hosts), port)


def place(config: RendezvousConfig, environ: Mapping[str, str], rank: int = -1, world: int = -1, names: str = "") -> Place:
    """This process's place.

    Args:
        config: the user's options.
        environ: the environment.
        rank, world: as given to `init_process_group`; -1 asks the environment.
        names: text of /etc/hosts, where a pod finds its full name.
    """
    rank = rank if rank >= 0 else _number(environ, _RANK, "rank")
    world = world if world > 0 else _number(environ, _WORLD, "world_size")
    if not 0 <= rank < world:
        raise ValueError(f"rank={rank} is not in a world of {world}: give ranks 0 to {world - 1}, one for each process")
    hosts = _hosts(config, environ, world, names)
    # torchrun's agents on several hosts may count differently
    counts = _RESTARTS if len(hosts) > 1 or config.etcd else ("TORCHELASTIC_RESTART_COUNT", *_RESTARTS)
    restarts = _number(environ, counts, "count of restarts", "0")
    return Place(_job(config, environ), rank, world, hosts, restarts)


def _number(environ: Mapping[str, str], keys: tuple[str, ...], what: str, otherwise: str = "") -> int:
    for key in keys:
        if environ.get(key):
            try:
                return int(environ[key])
            except ValueError:
                raise ValueError(f"{key}={environ[key]!r} is no number: this process cannot tell its {what}") from None
    if otherwise:
        return int(otherwise)
    raise ValueError(f"no launcher has told this process its {what} ({', '.join(keys)}): start it with torchrun or srun, or pass {what}=…")


def _job(config: RendezvousConfig, environ: Mapping[str, str]) -> str:
    if config.job or environ.get("LIGHTNING_GEMINI_JOB"):
        return config.job or environ["LIGHTNING_GEMINI_JOB"]
    if environ.get("SLURM_JOB_ID"):
        return f"slurm-{environ['SLURM_JOB_ID']}.{environ.get('SLURM_STEP_ID', '0')}"
    if environ.get("MASTER_PORT"):
        return f"{environ.get('TORCHELASTIC_RUN_ID', '')}@{environ.get('MASTER_ADDR', '')}:{environ['MASTER_PORT']}"
    if environ.get("JOB_COMPLETION_INDEX") and environ.get("HOSTNAME"):
        return "pods-" + environ["HOSTNAME"].partition(".")[0].rpartition("-")[0]
    raise ValueError("no launcher has named this job: set rendezvous.job, or LIGHTNING_GEMINI_JOB, to the same text in all its processes")


def _hosts(config: RendezvousConfig, environ: Mapping[str, str], world: int, names: str) -> tuple[str, ...]:
    hosts = config.hosts or [host for host in environ.get("LIGHTNING_GEMINI_HOSTS", "").split(",") if host]
    if hosts:
        return tuple(hosts) if len(hosts) > 1 or config.port is not None or not is_loopback(hosts[0]) else ()
    if _all_here(environ, world) or config.etcd:
        return ()
    if environ.get("SLURM_PROCID"):
        return _slurm_hosts(environ)
    if environ.get("JOB_COMPLETION_INDEX"):
        return _pod_hosts(environ, world, names)
    raise ValueError(
        f"this launcher does not tell which hosts the {world} ranks run on: set rendezvous.hosts (or LIGHTNING_GEMINI_HOSTS=a,b) "
        "in the order of their ranks, or rendezvous.etcd"
    )


def _all_here(environ: Mapping[str, str], world: int) -> bool:
    """Whether all ranks are on this node."""
    if environ.get("LOCAL_WORLD_SIZE"):
        return int(environ["LOCAL_WORLD_SIZE"]) == world
    if environ.get("SLURM_PROCID"):
        return environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES")) == "1"
    if environ.get("JOB_COMPLETION_INDEX"):
        return world == 1
    return is_loopback(environ.get("MASTER_ADDR", "localhost"))


def _slurm_hosts(environ: Mapping[str, str]) -> tuple[str, ...]:
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    hosts = hostlist.expand(nodes)
    counts = hostlist.tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or "1")
    if len(set(counts)) > 1:
        raise ValueError(f"Slurm started {counts} tasks on the nodes {nodes}: use --ntasks-per-node, so that each has as many")
    distribution = environ.get("SLURM_DISTRIBUTION", "block").partition(":")[0].partition(",")[0]
    if counts[0] > 1 and distribution not in ("block", "unknown"):  # with one task a node all orders are one, and srun says "cyclic"
        raise ValueError(f"SLURM_DISTRIBUTION={distribution!r} places ranks in another order: use srun --distribution=block")
    return tuple(hosts)


def _pod_hosts(environ: Mapping[str, str], world: int, names: str) -> tuple[str, ...]:
    index, name = int(environ["JOB_COMPLETION_INDEX"]), environ.get("HOSTNAME", "")
    full = [word for line in names.splitlines() for word in line.partition("#")[0].split()[1:] if word.startswith(name + ".")]
    count = int(environ.get("LIGHTNING_GEMINI_PODS") or world // int(environ.get("LOCAL_WORLD_SIZE", "1")))
    return tuple(hostlist.pods(full[0] if full else name, index, count))


def token(config: RendezvousConfig, environ: Mapping[str, str]) -> bytes:
    """The job's secret, empty if there is none. Raises `ValueError` for a file that others can read, or that is empty."""
    return secret.read(config.token_file, environ, "rendezvous.token_file")
