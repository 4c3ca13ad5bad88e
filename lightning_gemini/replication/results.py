"""Results of collectives from a log on another node: one connection, one question, the answer pulled piece by piece and verified.

Failure: bytes that do not match are pulled once more, then `ConnectionError`; a rank that keeps no log there -> `LookupError`.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable

from lightning_gemini.replication import messages
from lightning_gemini.replication.serving import decode_results
from lightning_gemini.replication.transport import Lane
from lightning_gemini.snapshot import blocks

_PIECE = 4 << 20
_ATTEMPTS = 2
_ANSWER_S = 60.0
Found = dict[tuple[str, int], "bytes | None"]


def fetch_results(
    connect: Callable[[], Lane], leave: Callable[[Lane], None], rank: int, groups: dict[str, int], done: Callable[[], None]
) -> tuple[concurrent.futures.Future[Found], Callable[[], None]]:
    """A future, and the work that completes it, to be run in a thread."""
    future: concurrent.futures.Future[Found] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()

    def work() -> None:
        try:
            lane = connect()
            try:
                future.set_result(_ask(lane, rank, groups))
            finally:
                leave(lane)
                lane.close()
        except Exception as error:  # whatever it is, whoever waits must hear of it
            future.set_exception(error)
        done()

    return future, work


def _ask(lane: Lane, rank: int, groups: dict[str, int]) -> Found:
    lane.say(messages.encode(messages.AskResults(rank, groups)))
    match messages.from_shelf.decode(lane.hear(_ANSWER_S)):
        case messages.Results(key, size, digest):
            return decode_results(_pulled(lane, key, size, digest))
        case messages.Failed(why):
            raise LookupError(why)
    raise ConnectionError("the node has answered something else")


def _pulled(lane: Lane, key: int, size: int, digest: int) -> bytearray:
    data = bytearray(size)
    for _ in range(_ATTEMPTS):
        with memoryview(data) as view:
            for start in range(0, size, _PIECE):
                lane.pull(key, start, view[start : start + _PIECE], start // _PIECE)
                if lane.completion() is None:
                    raise ConnectionError("the node has said something that nobody asked for")
            if blocks.digest(view) == digest:
                return data
    raise ConnectionError("results of collectives do not match their checksum, also when sent again")
