"""The receiving end of a push connection: replicas arrive, are verified block by block, committed, and only then acknowledged.

States of a transfer: offered -> (had already | refused) or receiving -> (some blocks again, once) -> committed -> acknowledged. A
connection that ends, a sender that stops, a membership that is over: the draft is given up, and the older version stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import msgspec

from lightning_gemini.replication import messages
from lightning_gemini.replication.store import Draft, Store
from lightning_gemini.replication.transport import Lane
from lightning_gemini.snapshot import blocks

_MAX_CHUNK = 1 << 30


class Receiver:
    """One connection. `current` gives a context in which the connection's membership is the present one, or raises."""

    def __init__(self, lane: Lane, store: Store, current: Callable[[], AbstractContextManager[None]]) -> None:
        self._lane, self._store, self._current = lane, store, current

    def run(self) -> None:
        """Until the connection ends: raises `OSError` or `StaleGeneration`."""
        while True:
            offer = messages.to_receiver.decode(self._lane.hear())
            if isinstance(offer, messages.Offer):  # else a sender that stopped when all had arrived
                self._say(self._answer(offer))

    def _say(self, message: msgspec.Struct) -> None:
        self._lane.say(messages.encode(message))

    def _answer(self, offer: messages.Offer) -> messages.Have | messages.Refused | messages.Done | messages.Failed:
        try:
            trailer = _checked(offer)
            if self._store.has(offer.rank, offer.step, offer.length, trailer):
                return messages.Have()
            draft = self._store.begin(offer.rank, offer.step, offer.kind, offer.length, trailer)
        except (ValueError, MemoryError) as error:
            return messages.Refused(str(error))
        try:
            return self._fill(draft, offer.length, trailer)
        finally:
            draft.end()

    def _fill(self, draft: Draft, length: int, trailer: blocks.Trailer) -> messages.Done | messages.Failed:
        cut = trailer.blocks(length)
        with draft.view[:length] as view:
            key = self._lane.expose(view, writable=True)
            self._say(messages.Go(key))
            bad = self._arrive(view, cut, trailer.digests, range(len(cut)))
            if bad:
                self._say(messages.Again(bad))  # it may have been damaged on the way
                bad = self._arrive(view, cut, trailer.digests, bad)
            self._lane.hide(key)
        if bad is None:
            return messages.Failed("the sender has stopped")
        if bad:
            return messages.Failed(f"{len(bad)} blocks do not match their checksums, also when sent again", bad)
        return self._commit(draft)

    def _commit(self, draft: Draft) -> messages.Done | messages.Failed:
        with self._current():
            try:
                draft.commit()
            except LookupError as error:
                return messages.Failed(str(error))
        return messages.Done()

    def _arrive(self, view: memoryview, cut: list[blocks.Block], digests: list[int], expected: range | list[int]) -> list[int] | None:
        """Receive some blocks; returns the numbers of the damaged ones, None when the sender has stopped."""
        left, bad = set(expected), []
        while left:
            number = self._lane.completion()
            if number is None:
                return None
            if number not in left:
                raise ConnectionError(f"block {number} was not expected")
            left.remove(number)
            block = cut[number]
            with view[block.start : block.start + block.size] as part:
                if blocks.digest(part) != digests[number]:
                    bad.append(number)
        return bad


def _checked(offer: messages.Offer) -> blocks.Trailer:
    """The trailer of an offer. Raises `ValueError` for one that contradicts itself: it decides how much memory is taken."""
    trailer = blocks.Trailer.decode(offer.trailer)
    if not 0 < trailer.chunk <= _MAX_CHUNK or trailer.travel != offer.length or len(trailer.digests) != -(-offer.length // trailer.chunk):
        raise ValueError(f"the offer of rank {offer.rank}, step {offer.step}, contradicts itself")
    return trailer
