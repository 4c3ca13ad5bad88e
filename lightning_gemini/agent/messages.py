"""Typed control messages between a rank and its node's agent.

Seam: msgspec structs, MessagePack on the wire (no pickle), one message per datagram of a `SOCK_SEQPACKET` pair that the agent
creates before it starts the process, so that nothing listens and no stranger can connect. A message that does not decode ends that
connection, and with it that process; nothing else.
"""

from __future__ import annotations

from typing import Any

import msgspec


class Message(msgspec.Struct, tag_field="type", kw_only=True):
    """Base of all messages."""


# ---- rank -> agent


class Hello(Message, tag="hello"):
    """A process has reached `fit`. `config` is the strategy's GeminiConfig as plain values."""

    pid: int
    config: dict[str, Any]
    directory: str
    """Folder of the telemetry files."""
    given: str = ""
    """The checkpoint that the user has given to go on from; empty for none."""
    given_step: int = -1
    """Its step, -1 where that cannot be told."""


class Waiting(Message, tag="waiting"):
    """A spare has run the script up to `fit` and waits for a rank."""


class Fault(Message, tag="fault"):
    """This rank raised: `where` names the place, `error` is the traceback's text. Not recoverable: the job must end with it."""

    generation: int
    step: int
    where: str
    error: str
    recoverable: bool = True
    at_ns: int = 0
    """When it was raised, on the machine's monotonic clock."""


class Stopped(Message, tag="stopped"):
    """This rank stands still for recovery `generation`: the answer to `Recover`."""

    generation: int
    step: int
    """Its newest committed boundary, and thus the step of its live state unless `wrote`."""
    wrote: bool
    """The optimizer of `step` has begun to write: live tensors are no source."""
    in_step: bool
    unwinding: bool
    """It re-enters `fit` from its snapshot: it counts as replaced."""
    counters: dict[str, int]
    """Collectives completed outside steps, by group."""
    at: int = -1
    """The step it is in."""


class Progress(Message, tag="progress"):
    """A phase of recovery `generation` is over on this rank: regrouped, restored or resumed."""

    generation: int
    phase: str
    step: int = -1


class Voted(Message, tag="voted"):
    """This rank's words on the board have changed; sent only where the job has more than one node."""


class Due(Message, tag="due"):
    """This rank has passed the boundary of a step that is to be persisted; rank 0 has described it."""

    step: int
    position: int
    """Of this rank among its twins, which hold the same bytes on other nodes …"""
    count: int
    """… and their number: each tensor is written by one of them."""


class LoaderStarted(Message, tag="loader_started"):
    """This rank has forked a loader process, which is nobody's child and the agent's to end; leader of its own process group."""

    pid: int


class Left(Message, tag="left"):
    """`fit` has returned on this rank."""


# ---- agent -> rank


class Assign(Message, tag="assign"):
    """A spare becomes `rank` in `generation`."""

    rank: int
    generation: int
    hosts: list[str] = []
    """Of the nodes, in the order of their ranks; empty when there is one node only."""


class Begin(Message, tag="begin"):
    """Where a rank that has just reached `fit` begins; sent only with persistent storage."""

    land: bool = False
    """At a plan that follows: the arenas are being filled from a checkpoint."""
    load: str = ""
    """From the checkpoint at this path, of another world; empty: at the script's own beginning."""


class Recover(Message, tag="recover"):
    """A new generation begins: stop at the next safe place and answer `Stopped`."""

    generation: int
    reason: str


class Plan(Message, tag="plan"):
    """What every rank does in `generation`; see `recovery.plan`."""

    generation: int
    target: int
    rewind: bool
    replaced: list[int]
    donors: dict[int, int]
    """rank whose shard at `target` is not committed -> rank that writes it from its live replica."""
    logs: dict[str, tuple[int, int]]
    """group -> (collectives completed by the furthest rank, that rank)."""
    hosts: list[str] = []
    """As in `Assign`."""


class Recovered(Message, tag="recovered"):
    """The first step after a recovery is complete on all ranks: seconds by phase."""

    generation: int
    reason: str
    step: int
    seconds: dict[str, float]
    count: int


class Stop(Message, tag="stop"):
    """The job ends: leave at once."""

    reason: str


FromRank = Hello | Waiting | Fault | Stopped | Progress | Voted | Due | LoaderStarted | Left
FromAgent = Begin | Assign | Recover | Plan | Recovered | Stop

_encoder = msgspec.msgpack.Encoder()
_from_rank: msgspec.msgpack.Decoder[FromRank] = msgspec.msgpack.Decoder(FromRank)
_from_agent: msgspec.msgpack.Decoder[FromAgent] = msgspec.msgpack.Decoder(FromAgent)


def encode(message: Message) -> bytes:
    """Message -> one datagram."""
    return _encoder.encode(message)


def decode_from_rank(data: bytes) -> FromRank:
    """Datagram of a rank -> message. Raises `msgspec.DecodeError`, also for a message of the wrong direction or types."""
    try:
        return _from_rank.decode(data)
    except (UnicodeDecodeError, RecursionError) as error:  # msgspec lets these two through
        raise msgspec.DecodeError(str(error)) from None


def decode_from_agent(data: bytes) -> FromAgent:
    """Datagram of the agent -> message. Raises `msgspec.DecodeError`."""
    try:
        return _from_agent.decode(data)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from None
