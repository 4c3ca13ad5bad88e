"""What agents tell each other through the membership: plain structs, MessagePack, no torch.

Units: `number` is a generation. `index` is a node's place in the roster: it has the ranks index * ranks_per_node and the next ones. A
`node` is the name of one incarnation of an agent: a machine that comes back has another.
"""

from __future__ import annotations

import msgspec

from lightning_gemini.recovery.plan import RankInventory

VERSION = 1
"""Of these records and of the agents' protocol; agents of another version are refused."""


class NodeInfo(msgspec.Struct, kw_only=True):
    """An agent that has registered."""

    node: str
    """Unique name of this incarnation."""
    host: str
    """Address in numbers, at which its ranks and its agent listen."""
    port: int
    """The agent's port."""
    ranks_per_node: int
    domain: str = ""
    """Failure domain (rack, switch, zone); empty: the node is its own."""
    preferred: int = -1
    """The index that the launcher gave it, -1 for none."""
    spare: bool = False
    """Takes part only in place of another."""
    version: int = VERSION
    again: bool = False
    """It was in this job before and was expelled."""
    token: str = ""
    """Shows that it knows the job's secret, and not what that is."""
    script: str = ""
    """Digest of the command line and of the package's version: all nodes run the same."""


class Generation(msgspec.Struct, kw_only=True):
    """A membership of the job."""

    number: int
    roster: list[str]
    """Node by index; an empty string is a vacant place."""
    reason: str = ""
    fault_step: int = -1
    """The step in which the newest fault happened, and how many there have been in it."""
    faults: int = 0
    detect_s: float = 0.0
    """From the fault to the begin of this generation, as far as whoever began it can tell."""


class NodeReport(msgspec.Struct, kw_only=True):
    """What a node has, when its ranks stand still for generation `number`."""

    number: int
    index: int
    ranks: dict[int, RankInventory]
    replicas: dict[int, dict[int, str]] = msgspec.field(default_factory=dict)
    """Rank of another node -> steps of which this node keeps a verified replica -> key of the twins (see `snapshot.manifest`)."""
    persisted: int = -1
    """Newest step that this node knows to be complete in persistent storage."""
    persisted_path: str = ""
    """Of that checkpoint."""
    lost_step: int = -1
    """Newest step that this agent's ranks had completed in an earlier life, from which it was expelled; -1 for none."""
    stopped_s: float = 0.0
    """From the moment this node saw the generation until its ranks stood still."""


class Completed(msgspec.Struct, kw_only=True):
    """All ranks of a node have completed a step after a recovery; seconds from the moment the node saw the generation."""

    number: int
    index: int
    restored_s: float
    regrouped_s: float
    resumed_s: float


class Outcome(msgspec.Struct, kw_only=True):
    """A completed recovery: seconds by phase, over all nodes."""

    number: int
    reason: str
    step: int
    seconds: dict[str, float]
    repeated_steps: int = 0


class Ending(msgspec.Struct, kw_only=True):
    """The job is over, with this exit status."""

    status: int
    reason: str
