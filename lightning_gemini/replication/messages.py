"""What agents say to each other, and how a connection between them proves itself. No sockets here.

Handshake, as between ranks (`peers.wire`, whose Challenge, Welcome and Refusal are used): the listener's nonce, the dialler's Hello with a
keyed BLAKE2b over all it says, the listener's proof. The keyed text begins with another word than between ranks, so that neither proof
serves in the other's place. After it, `purpose` decides what follows:

    push       Offer -> Have | Refused | Go(key), then the blocks, (Again, blocks)?, Done | Failed; or Stop instead of blocks
    pull       Describe -> Described | Failed, with any number of pulls; AskResults -> Results, with pulls
    control    the socket is handed to the two agents
"""

from __future__ import annotations

import hashlib

import msgspec

from lightning_gemini.membership.records import VERSION
from lightning_gemini.peers import wire

PUSH, PULL, CONTROL = "push", "pull", "control"


class Hello(msgspec.Struct, tag="agent", kw_only=True):
    """First words of a dialler."""

    job: str
    generation: int
    node: str
    to: str
    """Name of the node that it wants to speak to."""
    purpose: str
    nonce: bytes = b""
    mac: bytes = b""
    version: int = VERSION


class Offer(msgspec.Struct, tag="offer", array_like=True):
    """A snapshot that the receiver shall keep."""

    rank: int
    step: int
    kind: int
    length: int
    """Bytes of the travelling part."""
    trailer: bytes
    """Its `blocks.Trailer`."""


class Have(msgspec.Struct, tag="have", array_like=True):
    """The receiver has it already."""


class Go(msgspec.Struct, tag="go", array_like=True):
    """Push the blocks, numbered from 0, into this memory."""

    key: int


class Again(msgspec.Struct, tag="again", array_like=True):
    """These blocks did not match their checksums: push them once more."""

    numbers: list[int]


class Stop(msgspec.Struct, tag="stop", array_like=True):
    """The sender gives this transfer up; the connection stays."""


class Done(msgspec.Struct, tag="done", array_like=True):
    """Verified and committed: this is the acknowledgement."""


class Refused(msgspec.Struct, tag="refused", array_like=True):
    """The receiver cannot take it; the same again would be refused too."""

    why: str


class Failed(msgspec.Struct, tag="failed", array_like=True):
    """What was asked for was not possible."""

    why: str
    blocks: list[int] = []
    """Of a transfer: the blocks that did not match twice."""


class Describe(msgspec.Struct, tag="describe", array_like=True):
    """What is there of a rank's snapshot?"""

    rank: int
    step: int


class Described(msgspec.Struct, tag="described", array_like=True):
    """A snapshot in the listener's memory, exposed as `key`."""

    key: int
    kind: int
    whole: int
    """Bytes of the whole payload, of which a replica has the travelling part."""
    twins: str
    """The manifest's key."""
    trailer: bytes
    """Of what is there."""


class AskResults(msgspec.Struct, tag="ask_results", array_like=True):
    """Results of collectives from a rank's log: by group, the first index that is wanted."""

    rank: int
    groups: dict[str, int]


class Results(msgspec.Struct, tag="results", array_like=True):
    """They are exposed as `key`: `size` bytes, with this xxh3."""

    key: int
    size: int
    digest: int


ToReceiver = Offer | Stop
ToSender = Have | Go | Again | Done | Refused | Failed
ToShelf = Describe | AskResults
FromShelf = Described | Results | Failed

encode = msgspec.msgpack.Encoder().encode
hello: msgspec.msgpack.Decoder[Hello] = msgspec.msgpack.Decoder(Hello)
to_receiver: msgspec.msgpack.Decoder[ToReceiver] = msgspec.msgpack.Decoder(ToReceiver)
to_sender: msgspec.msgpack.Decoder[ToSender] = msgspec.msgpack.Decoder(ToSender)
to_shelf: msgspec.msgpack.Decoder[ToShelf] = msgspec.msgpack.Decoder(ToShelf)
from_shelf: msgspec.msgpack.Decoder[FromShelf] = msgspec.msgpack.Decoder(FromShelf)


def hello_mac(token: bytes, words: Hello, challenge: bytes) -> bytes:
    """Proof of the dialler over everything it says."""
    return _mac(token, b"agent dialler" + challenge + encode(msgspec.structs.replace(words, mac=b"")))


def welcome_mac(token: bytes, words: Hello, challenge: bytes) -> bytes:
    """Proof of the listener."""
    return _mac(token, b"agent listener" + challenge + words.nonce)


def _mac(token: bytes, text: bytes) -> bytes:
    return hashlib.blake2b(text, key=hashlib.blake2b(token).digest()).digest()


def frame(message: msgspec.Struct) -> bytes:
    """A message of the handshake, with its length before it."""
    return wire.frame(encode(message))
