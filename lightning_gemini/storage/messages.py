"""Typed messages between a node's agent and its storage process.

Seam: as `agent.messages`: msgspec structs, one per datagram of a `SOCK_SEQPACKET` pair, no pickle. The storage process answers each
request in turn: `Open` with `Opened`, `Persist` with `Copied` and then `Written`, `Commit` with `Committed`, `Discard` with `Discarded`,
`Fill` with `Filled`; or with `Failed` in place of what is still to come. `id` is the agent's own; answers repeat it, so that a late one
is recognised.
"""

from __future__ import annotations

import msgspec


class Message(msgspec.Struct, tag_field="type", kw_only=True):
    """Base of all messages."""

    id: int


class Place(msgspec.Struct, kw_only=True, frozen=True):
    """A rank's arena, and which part of the bytes behind its travelling segments this node writes."""

    arena: int
    """Index among the descriptors that the process was started with."""
    rank: int
    position: int = 0
    """Index of this node among those whose ranks hold the same bytes (`Manifest.key`) …"""
    count: int = 1
    """… and their number: each tensor is written by one of them."""


# ---- agent -> storage process


class Open(Message, tag="open"):
    """Is `url` a place that can be written, and where does the job begin? `resume`: auto, never, or the path of a checkpoint."""

    url: str
    resume: str = "auto"


class Persist(Message, tag="persist"):
    """Write this node's part of `step` into the checkpoint at `path`: `catalog.directory` below the URL, new to every attempt."""

    path: str
    step: int
    node: int
    places: list[Place]


class Commit(Message, tag="commit"):
    """All parts of the checkpoint at `path` have been written: complete it, then remove old ones. Goes to one node."""

    path: str
    step: int
    nodes: list[int]
    keep_last: int = 2
    keep_every_n_steps: int | None = None
    replicated: bool = True
    """Every rank holds all tensors (DDP)."""
    in_use: list[str] = []
    """Checkpoints of this URL that somebody of this job reads."""


class Discard(Message, tag="discard"):
    """Remove an incomplete checkpoint; no process may be writing to it any more."""

    path: str


class Fill(Message, tag="fill"):
    """Put the tensors of a checkpoint back into the arenas of this node's ranks."""

    path: str
    places: list[Place]


# ---- storage process -> agent


class Opened(Message, tag="opened"):
    """The URL can be written; `path` is the checkpoint to go on from, empty when the job begins anew."""

    path: str = ""
    step: int = -1
    world: int = 0
    nodes: int = 0
    replicated: bool = True
    """The arenas can be filled from it when these three are as in the job; else ranks load it (`storage.resume`)."""


class Copied(Message, tag="copied"):
    """This node's part is in the process's own memory: arenas may be overwritten."""

    step: int


class Written(Message, tag="written"):
    """This node's part is written."""

    step: int
    bytes: int
    seconds: float


class Committed(Message, tag="committed"):
    """The checkpoint is complete."""

    step: int
    removed: list[str]
    """Names of old checkpoints that were removed."""
    warning: str = ""
    """Why old ones could not be removed."""


class Discarded(Message, tag="discarded"):
    """Nothing is left of it."""


class Filled(Message, tag="filled"):
    """All arenas have a committed slot of `step`."""

    step: int


class Failed(Message, tag="failed"):
    """A request could not be carried out; nothing older was touched. `error` names cause and remedy in one line."""

    error: str


Request = Open | Persist | Commit | Discard | Fill
Answer = Opened | Copied | Written | Committed | Discarded | Filled | Failed

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


def encode(message: Message) -> bytes:
    """Message -> one datagram."""
    return _encoder.encode(message)


def decode_request(data: bytes) -> Request:
    """Datagram of the agent -> message. Raises `msgspec.DecodeError`."""
    return _requests.decode(data)


def decode_answer(data: bytes) -> Answer:
    """Datagram of the storage process -> message. Raises `msgspec.DecodeError`."""
    return _answers.decode(data)
