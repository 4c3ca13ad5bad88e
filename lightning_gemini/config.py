"""The typed options of lightning_gemini: one schema for Python, YAML and the command line.

Seam: `GeminiConfig` is what the strategy holds and what the agent is told. `parse` turns plain mappings (a dict, an OmegaConf node)
into it. Failure: an unknown key, a wrong type or a value out of range raises `ValueError` that names the key, the value and the
remedy, before any process is started. Imports neither torch nor lightning: the agent and Hydra's plugin import it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_type_hints

import msgspec

FAULT_KINDS = ("kill", "raise", "stop", "exit", "segv")
FAULT_POINTS = ("before_step", "forward", "backward", "optimizer", "after_step", "validation", "callback")

T = TypeVar("T")


def _require(condition: bool, key: str, value: object, remedy: str) -> None:
    if not condition:
        raise ValueError(f"{key}={value!r} is not valid: {remedy}")


@dataclass(slots=True, kw_only=True)
class SnapshotConfig:
    """What is kept of each step, and how."""

    every_n_steps: int = 1
    """Cadence of tensor snapshots in optimizer steps. 1 loses no completed step; n > 1 may repeat up to n - 1 of them. 0 takes none: a
    replaced rank gets its state from a live replica on its node, and what no healthy rank holds is lost."""
    background: bool = True
    """Copy what another rank of the node holds too in a background thread, fenced before the next optimizer write. False copies inside the
    step."""
    chunk_kib: int = 1024
    """Unit of copying and hashing in KiB: small enough to stay in cache between the two."""
    local_state_mib: int = 64
    """Room for one rank's local state (RNG, loops, callbacks, metrics) in MiB, two slots each; touched only as far as used."""
    collective_log_mib: int = 32
    """Room for the results of collectives between two steps (validation metrics, barriers), replayed by a replaced rank."""

    def __post_init__(self) -> None:
        _require(self.every_n_steps >= 0, "snapshot.every_n_steps", self.every_n_steps, "give the cadence in steps, or 0 for none")
        _require(4 <= self.chunk_kib <= 1 << 20, "snapshot.chunk_kib", self.chunk_kib, "give a size between 4 and 1048576 KiB")
        _require(self.local_state_mib >= 1, "snapshot.local_state_mib", self.local_state_mib, "give at least 1 MiB")
        _require(self.collective_log_mib >= 1, "snapshot.collective_log_mib", self.collective_log_mib, "give at least 1 MiB")


@dataclass(slots=True, kw_only=True)
class RecoveryConfig:
    """How a fault is detected and answered."""

    spares: int = 1
    """Warm processes kept ready on the node; each has run the script up to `fit`. 0 starts a replacement only when it is needed."""
    max_faults_per_step: int = 3
    """After so many faults in the same step the job ends with the fault's own error: it is a bug, not bad luck."""
    heartbeat_timeout_s: float = 60.0
    """A rank whose watcher thread is silent for so long is killed and replaced. A stopped process (SIGSTOP) is noticed in a second."""
    regroup_timeout_s: float = 600.0
    """How long a recovery waits for a rank to reach its next collective, or for a spare to become ready."""
    collective_timeout_s: float = 1800.0
    """Limit of one collective inside a group, as `timeout` in Lightning's strategies."""

    def __post_init__(self) -> None:
        _require(0 <= self.spares <= 64, "recovery.spares", self.spares, "give the number of spare processes, 0 to 64")
        _require(self.max_faults_per_step >= 0, "recovery.max_faults_per_step", self.max_faults_per_step, "give 0 or more")
        for key in ("heartbeat_timeout_s", "regroup_timeout_s", "collective_timeout_s"):
            value = getattr(self, key)
            _require(value > 0, f"recovery.{key}", value, "give a positive number of seconds")
        _require(self.heartbeat_timeout_s >= 2, "recovery.heartbeat_timeout_s", self.heartbeat_timeout_s, "give 2 seconds or more")


@dataclass(slots=True, kw_only=True)
class ReplicationConfig:
    """How snapshots get to other nodes. Nothing of it matters on one node."""

    copies: int = 2
    """Nodes whose memory holds each byte of the state, the own one included (Gemini's m). 1 keeps nothing elsewhere: a lost node then means
    going back to persistent storage."""
    when_behind: str = "skip"
    """What a step does that would overwrite the newest snapshot before it is replicated. skip: it takes no snapshot, the step after may.
    wait: it waits, so that a lost node never costs more than the step under way; a slow network then slows training."""

    def __post_init__(self) -> None:
        _require(1 <= self.copies <= 16, "replication.copies", self.copies, "give a number of nodes, 1 to 16")
        _require(self.when_behind in ("skip", "wait"), "replication.when_behind", self.when_behind, "choose skip or wait")


@dataclass(slots=True, kw_only=True)
class MembershipConfig:
    """How the agents of several nodes find each other and agree. Nothing of it matters on one node."""

    etcd: list[str] = field(default_factory=list)
    """URLs (http:// or https://host:port) of the members of an etcd cluster."""
    ca: str | None = None
    """File with the certificates that etcd's own is checked against. None: ETCD_CACERT of the environment, as for etcdctl."""
    cert: str | None = None
    """File with the certificate that etcd is shown. None: ETCD_CERT."""
    key: str | None = None
    """File with that certificate's key. None: ETCD_KEY."""
    user: str | None = None
    """Of etcd's authentication. None: ETCD_USER. The password comes from ETCD_PASSWORD only."""
    lease_ttl_s: int = 4
    """A node that has not renewed its registration for so long is lost."""
    join_timeout_s: float = 600.0
    """How long the first nodes wait for the others before the job begins."""
    vacancy_timeout_s: float = 3600.0
    """How long the job waits for a node to take the place of a lost one."""

    def __post_init__(self) -> None:
        for url in self.etcd:
            _require(url.startswith(("http://", "https://")), "membership.etcd", url, "give URLs such as http://etcd:2379")
        _require(2 <= self.lease_ttl_s <= 3600, "membership.lease_ttl_s", self.lease_ttl_s, "give whole seconds, 2 or more")
        _require((self.cert is None) == (self.key is None), "membership.cert", self.cert, "give membership.key too, or neither")
        for key in ("join_timeout_s", "vacancy_timeout_s"):
            _require(getattr(self, key) > 0, f"membership.{key}", getattr(self, key), "give a positive number of seconds")


@dataclass(slots=True, kw_only=True)
class PersistentConfig:
    """Checkpoints in persistent storage: for the loss of more memory than the copies cover, and for the next job."""

    url: str = ""
    """Folder, or any URL that fsspec knows (s3://, gs://), the same from all nodes. Empty: nothing is persisted."""
    every_n_steps: int = 1000
    """Cadence in optimizer steps; writing goes on beside the training."""
    keep_last: int = 2
    """Checkpoints kept, the newest ones."""
    keep_every_n_steps: int | None = None
    """Besides them, the first one of every so many steps is kept for good. None: no more."""
    resume: str = "auto"
    """Where a job begins: auto (the newest checkpoint at the URL, if there is one), never, or a checkpoint's path."""

    def __post_init__(self) -> None:
        _require(self.every_n_steps >= 1, "persistent.every_n_steps", self.every_n_steps, "give the cadence in steps, 1 or more")
        _require(self.keep_last >= 1, "persistent.keep_last", self.keep_last, "give 1 or more")
        _require(self.keep_every_n_steps is None or self.keep_every_n_steps >= 1, "persistent.keep_every_n_steps",
                 self.keep_every_n_steps, "give a number of steps, or leave it out")  # fmt: skip
        _require(bool(self.resume), "persistent.resume", self.resume, "choose auto, never or a checkpoint's path")

    def due(self, step: int) -> bool:
        """Whether the boundary of `step` goes to storage."""
        return bool(self.url) and step > 0 and step % self.every_n_steps == 0


@dataclass(slots=True, kw_only=True)
class RendezvousConfig:
    """How ranks find each other without a TCPStore."""

    hosts: list[str] | None = None
    """The job's hosts in the order of their ranks, for launchers that do not tell. None: ask Slurm, Kubernetes or torchrun."""
    port: int | None = None
    """First of the TCP ports that ranks listen at. None: derived from the job's name; on one node unix sockets, and no port at all."""
    job: str | None = None
    """Name of the job, the same in all its processes and in no other job. None: from the launcher."""
    timeout_s: float = 600.0
    """How long a rank waits for a peer to appear."""
    token_file: str | None = None
    """File with the job's secret, readable by its owner only. None: the environment variable LIGHTNING_GEMINI_TOKEN."""
    etcd: str | None = None
    """URL of an etcd (http:// or https://host:port) through which ranks tell each other where they listen. None: they compute it."""

    def __post_init__(self) -> None:
        _require(self.hosts is None or len(self.hosts) > 0, "rendezvous.hosts", self.hosts, "name the hosts, or leave it out")
        _require(self.port is None or 0 < self.port < 65536, "rendezvous.port", self.port, "give a port between 1 and 65535")
        _require(self.timeout_s > 0, "rendezvous.timeout_s", self.timeout_s, "give a positive number of seconds")
        _require(self.etcd is None or self.etcd.startswith(("http://", "https://")), "rendezvous.etcd", self.etcd,
                 "give a URL such as http://etcd:2379")  # fmt: skip
        _require(self.etcd is None or self.hosts is None, "rendezvous.etcd", self.etcd, "leave out rendezvous.hosts: etcd knows them")


@dataclass(slots=True, kw_only=True)
class DataConfig:
    """How training batches are kept in memory that outlives a rank."""

    prefetch_length: int = 10
    """Batches made ahead of the rank that is furthest."""
    lookback_length: int = 2
    """Batches kept behind the rank that is last: what a replaced rank begins with. What is older can be made again, more slowly."""
    directory: str | None = None
    """Where batches lie, in files without a name. None: shared memory."""
    size_limit_mib: int = 2048
    """Limit of all batches of one loader, in MiB; it comes before the two lengths."""
    encryption: bool = False
    """Encrypt them with a key that only this job's processes on this node have; for a directory on a disk. Costs a copy."""
    share: bool = True
    """Ranks of a node that read the same data (tensor- or sequence-parallel peers) read it from one loader."""
    setup_ahead: bool = False
    """Spares run the data module's `setup` before they are needed. Only for one that does not ask for its rank."""

    def __post_init__(self) -> None:
        _require(
            1 <= self.prefetch_length <= 256, "mapped_data.prefetch_length", self.prefetch_length, "give a number of batches, 1 to 256"
        )
        _require(
            0 <= self.lookback_length <= 256, "mapped_data.lookback_length", self.lookback_length, "give a number of batches, 0 to 256"
        )
        _require(self.size_limit_mib >= 1, "mapped_data.size_limit_mib", self.size_limit_mib, "give at least 1 MiB")


@dataclass(slots=True, kw_only=True)
class TelemetryConfig:
    """What the run says about itself."""

    directory: str | None = None
    """Where the JSONL event files go, one per rank and one of the agent. None: `<trainer.default_root_dir>/gemini`."""
    log_to_logger: bool = True
    """Write the phases of each recovery to the Trainer's logger under `gemini/`."""
    banner: bool = True
    """Say at start what survives what and how much memory it takes."""


@dataclass(slots=True, kw_only=True)
class FaultConfig:
    """One fault to inject, for drills and tests. It fires once, in the first process that reaches it."""

    kind: str
    """kill (SIGKILL), raise (an exception), stop (SIGSTOP), exit (os._exit), segv (SIGSEGV)."""
    rank: int
    """The rank that suffers it."""
    step: int
    """The optimizer step (`global_step` before the step) in which it happens."""
    where: str = "forward"
    """before_step, forward, backward, optimizer (inside the optimizer's write), after_step, validation, callback."""

    def __post_init__(self) -> None:
        _require(self.kind in FAULT_KINDS, "faults.kind", self.kind, f"choose one of {', '.join(FAULT_KINDS)}")
        _require(self.where in FAULT_POINTS, "faults.where", self.where, f"choose one of {', '.join(FAULT_POINTS)}")
        _require(self.rank >= 0, "faults.rank", self.rank, "give a rank of the job, 0 or more")
        _require(self.step >= 0, "faults.step", self.step, "give an optimizer step, 0 or more")


@dataclass(slots=True, kw_only=True)
class GeminiConfig:
    """All options. Every group may be left out."""

    snapshot: SnapshotConfig = field(default_factory=SnapshotConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    replication: ReplicationConfig = field(default_factory=ReplicationConfig)
    membership: MembershipConfig = field(default_factory=MembershipConfig)
    persistent: PersistentConfig = field(default_factory=PersistentConfig)
    faults: list[FaultConfig] = field(default_factory=list)
    """Faults to inject. Empty, which is the default, injects none."""


def parse(kind: type[T], value: object, key: str = "") -> T:
    """Build dataclass `kind` from a mapping (or return it as it is), refusing unknown keys and wrong types.

    Args:
        kind: one of the dataclasses of this module.
        value: an instance of it, a mapping of plain values, or None for the defaults.
        key: path of `value` in the user's config, for the error message.
    """
    if isinstance(value, kind):
        return value
    if value is None:
        return kind()
    if not isinstance(value, Mapping):
        raise ValueError(f"{key or kind.__name__}={value!r} is not valid: give a mapping with the keys {_names(kind)}")
    hints = get_type_hints(kind)
    for name in value:
        if name not in hints:
            close = difflib.get_close_matches(str(name), hints, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"unknown key {_join(key, str(name))!r}: {hint}Known keys are {_names(kind)}")
    given = {str(name): _convert(hints[str(name)], item, _join(key, str(name))) for name, item in value.items()}
    try:
        return kind(**given)
    except TypeError as error:  # a required key is absent
        raise ValueError(f"{key or kind.__name__}: {error}; known keys are {_names(kind)}") from None


def _convert(hint: Any, value: object, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return parse(hint, value, key)  # type: ignore[arg-type]
    if hint == list[FaultConfig]:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ValueError(f"{key}={value!r} is not valid: give a list of faults, each with the keys {_names(FaultConfig)}")
        return [parse(FaultConfig, item, f"{key}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        value = list(value)  # OmegaConf's lists are none
    try:
        return msgspec.convert(value, hint, strict=True)
    except msgspec.ValidationError as error:
        raise ValueError(f"{key}={value!r} is not valid: {error}") from None


def _names(kind: Any) -> str:
    return ", ".join(f.name for f in dataclasses.fields(kind))


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
