"""The giving end of a pull connection: tells what is on the shelf, exposes it, and serves what is pulled while it listens.

What it exposes stays exposed until the connection ends, which is when the fetch is over, or the generation. The bytes are verified by who
takes them: this end has no reason to read them first.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from lightning_gemini.replication import messages
from lightning_gemini.replication.arenas import Held
from lightning_gemini.replication.shelf import Shelf
from lightning_gemini.replication.transport import Lane
from lightning_gemini.snapshot import blocks
from lightning_gemini.snapshot.slots import CorruptSnapshot


def serve(lane: Lane, shelf: Shelf, held: Held) -> None:
    """Until the connection ends: raises `OSError`."""
    while True:
        question = messages.to_shelf.decode(lane.hear())
        try:
            answer = _describe(lane, shelf, question) if isinstance(question, messages.Describe) else _results(lane, held, question)
        except (LookupError, CorruptSnapshot) as error:
            answer = messages.Failed(str(error))
        lane.say(messages.encode(answer))


def _describe(lane: Lane, shelf: Shelf, question: messages.Describe) -> msgspec.Struct:
    copy = shelf.look(question.rank, question.step)
    key = lane.expose(copy.view(), writable=False)
    return messages.Described(key, copy.slot.kind, copy.whole, copy.twins, copy.trailer.encode())


def _results(lane: Lane, held: Held, question: messages.AskResults) -> msgspec.Struct:
    data = encode_results(held.results(question.rank, question.groups))
    return messages.Results(lane.expose(memoryview(data), writable=False), len(data), blocks.digest(data))


def encode_results(results: Mapping[tuple[str, int], bytes | None]) -> bytes:
    """Results of collectives as they travel."""
    return messages.encode([(group, index, data) for (group, index), data in results.items()])


_decode = msgspec.msgpack.Decoder(list[tuple[str, int, bytes | None]]).decode


def decode_results(data: bytes | bytearray) -> dict[tuple[str, int], bytes | None]:
    """Inverse of `encode_results`."""
    return {(group, index): result for group, index, result in _decode(data)}
