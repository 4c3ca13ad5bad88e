"""What peers say to each other, and how a connection proves itself. No sockets here, no torch, no pickle.

Handshake: with a token the listener speaks first, so that a stranger learns nothing but a nonce.
    listener  Challenge(nonce)                              where the job has a token; on one node the kernel vouches for the user
    dialler   Hello(job, generation, rank, to, …, mac)      mac = keyed BLAKE2b(token, "dialler", both nonces, all fields)
    listener  Welcome(mac) or Refusal(kind, text)           mac = keyed BLAKE2b(token, "listener", both nonces)
Both sides compare in constant time. After it, requests (id, message) and replies (id, value or error) follow. A frame is a big-endian
length and MessagePack; one that is too long or does not decode ends the connection.
"""

from __future__ import annotations

import hashlib
import hmac  # for compare_digest only
import os
from typing import Any

import msgspec

VERSION = 1
MAX_STRANGER_BYTES = 4096
"""Largest frame of a connection that has not proved itself."""
MAX_BYTES = 256 << 20
"""Largest frame of a peer: an all-gather's last round carries half of all blocks."""
GOOD_BYE = 0
"""Number of the reply that answers no request: the connection ends in good order. Its value is true when the peer leaves the job, having
had all it needs; else the generation is over."""


class Challenge(msgspec.Struct, tag="challenge"):
    """First words of a listener."""

    nonce: bytes


class Hello(msgspec.Struct, tag="hello", kw_only=True):
    """First words of a dialler."""

    job: str
    generation: int
    rank: int
    to: int
    """The rank it wants to speak to."""
    process: bytes
    """Random name of the process: tells a rank's replacement, or a second claimant, from itself."""
    nonce: bytes
    mac: bytes = b""
    version: int = VERSION


class Welcome(msgspec.Struct, tag="welcome"):
    """The listener is who it should be."""

    mac: bytes


class Refusal(msgspec.Struct, tag="refusal"):
    """The listener ends the connection; `kind` is stale, duplicate, wrong or unproved."""

    kind: str
    text: str


# ---- requests: what a peer is asked to do with a key it owns or keeps for somebody


class Get(msgspec.Struct, tag="get"):
    """Wait for a key and return (version, value)."""

    key: str


class Put(msgspec.Struct, tag="put"):
    """Set a key."""

    key: str
    value: bytes


class Add(msgspec.Struct, tag="add"):
    """Add to a counter; returns the sum."""

    key: str
    amount: int


class Append(msgspec.Struct, tag="append"):
    """Append to a value."""

    key: str
    value: bytes


class CompareSet(msgspec.Struct, tag="compare_set"):
    """Set a key if it has the expected value (or none and `expected` is empty); returns what it has then."""

    key: str
    expected: bytes
    desired: bytes


class Check(msgspec.Struct, tag="check"):
    """Whether a key is there."""

    key: str


class Delete(msgspec.Struct, tag="delete"):
    """Remove a key; returns whether it was there."""

    key: str


class Forget(msgspec.Struct, tag="forget"):
    """A copy older than `version` is out of date."""

    key: str
    version: int


class Post(msgspec.Struct, tag="post"):
    """Put blocks into a mailbox."""

    box: str
    blocks: list[bytes]


class Take(msgspec.Struct, tag="take"):
    """Wait for a mailbox and empty it."""

    box: str


Change = Put | Add | Append | CompareSet | Delete
Question = Get | Check | Forget | Change | Take
Message = Question | Post


class Request(msgspec.Struct, array_like=True):
    """Dialler -> listener."""

    id: int
    message: Message


class Reply(msgspec.Struct, array_like=True):
    """Listener -> dialler; a post has none. `error` is empty when the request succeeded."""

    id: int
    value: Any
    """A plain value; what it is follows from the request."""
    error: str = ""


encode = msgspec.msgpack.Encoder().encode
from_listener: msgspec.msgpack.Decoder[Challenge | Welcome | Refusal] = msgspec.msgpack.Decoder(Challenge | Welcome | Refusal)
from_dialler: msgspec.msgpack.Decoder[Hello] = msgspec.msgpack.Decoder(Hello)
request: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
reply: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def nonce() -> bytes:
    """Sixteen random bytes."""
    return os.urandom(16)


def hello_mac(token: bytes, hello: Hello, challenge: bytes) -> bytes:
    """Proof of the dialler over everything it says."""
    said = msgspec.structs.replace(hello, mac=b"")
    return _mac(token, b"dialler" + challenge + encode(said))


def welcome_mac(token: bytes, hello: Hello, challenge: bytes) -> bytes:
    """Proof of the listener."""
    return _mac(token, b"listener" + challenge + hello.nonce)


def _mac(token: bytes, text: bytes) -> bytes:
    """Python's own BLAKE2b (RFC 7693, keyed), never OpenSSL: a loader's worker is forked while this runs in the peers' thread, inherits
    OpenSSL's locks as they are, and then hangs or crashes in its own first use of it (multiprocessing authenticates with HMAC)."""
    return hashlib.blake2b(text, key=hashlib.blake2b(token).digest()).digest()


def same(a: bytes, b: bytes) -> bool:
    """Constant-time comparison."""
    return hmac.compare_digest(a, b)


def require_token(token: bytes) -> None:
    """Raise `ValueError` if there is none: nothing listens beyond loopback without it."""
    if not token:
        raise ValueError(
            "peers on other hosts need a secret: set LIGHTNING_GEMINI_TOKEN to the same random text in every process of the job, "
            "or --token-file (rendezvous.token_file) to a file with it that only you can read"
        )


def frame(body: bytes) -> bytes:
    """A body with its length before it."""
    return len(body).to_bytes(4, "big") + body
