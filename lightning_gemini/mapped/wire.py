"""What a feeder and the ranks that it feeds say to each other.

Seam: msgspec structs, MessagePack, one message per datagram of a `SOCK_SEQPACKET` unix socket with an abstract name; batches, records and
errors travel as descriptors of nameless files. The kernel names the user at the other end: a process of another user is not talked to.

    rank -> feeder   Attach, Want …, Bye
    feeder -> rank   Attached or Gone, then Batch …, and at last End or Failed
"""

from __future__ import annotations

import hashlib
import os
import socket

import msgspec

MAX_BYTES = 4096


class Message(msgspec.Struct, tag_field="type", kw_only=True):
    """Base of all messages."""


class Attach(Message, tag="attach"):
    """Rank `member` reads from batch `number` on. A rank that attaches again (its replacement) takes its predecessor's place."""

    member: int
    number: int


class Want(Message, tag="want"):
    """The rank has used all batches before `number`."""

    number: int


class Bye(Message, tag="bye"):
    """Rank `member` needs nothing more. A feeder ends when all its ranks have said so."""

    member: int


class Attached(Message, tag="attached"):
    """Batches will come."""

    key: bytes
    """For `files.read`; empty without encryption."""


class Gone(Message, tag="gone"):
    """That batch is older than what is kept."""


class Batch(Message, tag="batch"):
    """With a descriptor per size: the file of the batch and its record, and shared memory that the file refers to."""

    number: int
    sizes: list[int]


class End(Message, tag="end"):
    """There are `number` batches. With one descriptor: the loader's generators after the last."""

    number: int
    size: int


class Failed(Message, tag="failed"):
    """With one descriptor: the exception of the user's loader, raised instead of batch `number`."""

    number: int
    size: int


FromRank = Attach | Want | Bye
FromFeeder = Attached | Gone | Batch | End | Failed
encode = msgspec.msgpack.Encoder().encode
decode_from_rank = msgspec.msgpack.Decoder(FromRank).decode
decode_from_feeder = msgspec.msgpack.Decoder(FromFeeder).decode


def new_socket() -> socket.socket:
    """An unbound one."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def address(name: str) -> bytes:
    """The abstract address of feeder `name` of this user."""
    digest = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()  # such an address has 108 bytes at most
    return f"\0lightning-gemini-feeder/{os.geteuid()}/{digest}".encode()
