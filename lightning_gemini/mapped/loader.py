"""What stands in the Trainer for the user's training loader: it reads its batches from a feeder.

Seam: a `PositionedLoader` (position, adopt, begin_at), so that a replaced rank begins at its predecessor's batch; and Lightning's own
protocol of resumable loaders (`state_dict`, `load_state_dict`), so that a checkpoint in the middle of an epoch goes on with the next batch,
with any strategy. One feeder per `iter()`, forked when the first batch is asked for: it sees the loader, its samplers and its data set as
they are then. The feeder before it is kept until a replaced rank can no longer need it.

Random numbers: the feeder begins with this process's generators, and this process takes over what the loader's start drew from them (the
seed of the workers and of the shuffle). So training draws the same numbers as with the bare loader, unless the data draws from the global
generators in the main process for each sample (augmentation with num_workers=0): that no longer mixes with the draws of training.

What data set and samplers count in plain attributes (`self.epoch += 1`) is taken over too; other state that they build up stays in the
feeder, and so does what this process changes in them after the first batch of an epoch.

Failures: the feeder is lost or no longer keeps the batch -> another one is started at the position, which skips what was used; lost
`_MOST_LOSSES` times without a batch in between -> `RuntimeError`.
"""

from __future__ import annotations

import errno
import logging
import pickle
import socket
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from lightning_gemini.config import DataConfig
from lightning_gemini.data.parts import changed, counting, held_by, restore_scalars
from lightning_gemini.data.position import READ_AHEAD, PositionedLoader
from lightning_gemini.forks import not_in_children
from lightning_gemini.mapped import checkpoint, wire
from lightning_gemini.mapped.feed import BatchGone, EndOfData, Feed, FeederLost
from lightning_gemini.mapped.feeder import Task
from lightning_gemini.mapped.forking import Owner, start
from lightning_gemini.state import rng

log = logging.getLogger(__name__)
_MOST_LOSSES = 3
_CPU = torch.device("cpu")
_NAME_S = 10.0
"""How long a name may be held by a feeder that is about to end."""
_RETRY_S = 0.01


@dataclass(slots=True)
class Stream:
    """Which data this is, and who reads it."""

    name: str
    """The same in every local rank that reads the same data, and in no other."""
    member: int
    """This rank."""
    ranks: int
    """How many local ranks read it."""
    ahead: Callable[[], int]
    """Batches that the loop has taken and not used yet."""
    epoch_is_over: Callable[[], bool]
    """Whether the newest batch is the last one the loop wants of this epoch."""
    interrupted_at: Callable[[], int] = lambda: 0
    """Batches of the epoch that a checkpoint says were used."""
    resumed: Callable[[], None] = lambda: None
    """Called when the loader has been given its place in a checkpoint."""
    settled: Callable[[], None] = lambda: None
    """Called when no replaced rank can go back to what came before this epoch."""


class _Numbers:
    """Of the loaders of this process."""

    next = 0


class MappedLoader(PositionedLoader):
    """See the module's docstring. Every other attribute is the loader's own."""

    def __init__(self, loader: Any, config: DataConfig, stream: Stream, owner: Owner) -> None:
        super().__init__(loader)
        self._config, self._stream, self._owner = config, stream, owner
        self._records: deque[Any] = deque(maxlen=READ_AHEAD + 1)
        self._ended: Any = None
        self._after_iter: dict[str, Any] | None = None
        """The generators after `iter()` of the bare loader."""
        self._index, _Numbers.next = _Numbers.next, _Numbers.next + 1
        self._feeds = 0
        self._name, self._previous = "", ""
        self._feed: Feed | None = None
        self._previous_feed: Feed | None = None
        self._checkpointed: dict[str, Any] | None = None
        """What a checkpoint says, in the epoch that goes on from it."""
        self._pin = bool(getattr(loader, "pin_memory", False)) and torch.cuda.is_available()
        if getattr(loader, "pin_memory", False):
            loader.pin_memory = False  # the feeder must not touch the device; it is done here

    # ---- positions

    def position(self, ahead: int = 0) -> dict[str, Any]:
        """As `PositionedLoader.position`; the record says how to make the batch again where no feeder has it. `saved`: before the first
        batch since a checkpoint, what that says."""
        record = self._record(ahead)
        place = {"index": self._index, "feeds": self._feeds, "name": self._name, "previous": self._previous}
        generators = {"at_iter": self._at_iter, "started": self._after_iter}
        saved = self._checkpointed if record is None else None
        return {"count": self._count - ahead, "record": record, "saved": saved, **generators, **place}

    def _record(self, ahead: int) -> Any:
        return self._records[-(ahead + 1)] if len(self._records) > ahead else None

    def adopt(self, position: dict[str, Any]) -> None:
        """As `PositionedLoader.adopt`."""
        self._at_iter = position["at_iter"]

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: what comes after the batches that the loop has used. All ranks call it."""
        ahead = self._stream.ahead()
        record, now = self._record(ahead), self.capture()
        if record is None and self._at_iter is not None:  # whatever was read ahead will be read again
            now = self._at_iter
        elif record is not None:
            now = {**now, "held": self._held()}
        return checkpoint.pack({"count": self._count - ahead, "record": record, "over": self._stream.epoch_is_over(), "now": now})

    def _held(self) -> Any:
        """What the feeder has made of the generators that the loader holds."""
        newest = self._ended or (self._records[-1]["after"] if self._records else {})
        return newest.get("held", {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin there. Raises `ValueError` for the state of another kind of loader."""
        self._begin = self._checkpointed = checkpoint.unpack(state)
        self._stream.resumed()

    # ---- iterating

    def __iter__(self) -> Iterator[Any]:
        begin = self._begin  # until something is fetched: Lightning before 2.5 may call twice before the first batch
        self._generators = held_by(self._loader)
        if begin is None:
            rng.restore_private(self._generators, self._held())
            self._checkpointed = None
        self._records.clear()
        self._ended = None
        self._count = 0
        if begin is None:
            if not self._feeds and (used := self._stream.interrupted_at()):
                log.warning("the checkpoint, after batch %s of its epoch, was saved without mapped data: the epoch begins anew", used)
            self._start_epoch()
            return self._first()
        return self._saved(begin) if "now" in begin else self._replaced(begin)

    def _start_epoch(self) -> None:
        self._at_iter = self.capture()
        if isinstance(self._loader, DataLoader):  # its iterator draws a seed for its workers, also without any
            torch.empty((), dtype=torch.int64).random_(generator=self._loader.generator)
        self._after_iter = self.capture()

    def _feed_name(self) -> str:
        self._feeds += 1
        return f"{self._stream.name}/{self._index}.{self._feeds}"

    def _first(self) -> Iterator[Any]:
        """An epoch from its beginning. Lazy, so that the sampler's epoch is set before the feeder is forked."""
        now, at_iter = self.capture(), self._at_iter  # where something has drawn since `iter()`, the first fetch begins with that
        drawn_since = pickle.dumps(now) != pickle.dumps(self._after_iter)
        begin = {"count": 0, "at_iter": at_iter, "at_fetch": [now] if drawn_since else []}
        yield from self._batches(begin, self._feed_name())

    def _replaced(self, position: dict[str, Any]) -> Iterator[Any]:
        """Where the predecessor was: its newest batch comes first."""
        self._begin = None
        self._index, self._feeds = position["index"], position["feeds"]
        _Numbers.next = max(_Numbers.next, self._index + 1)  # later loaders of this process are numbered as those of its peers
        self._name, self._previous = position["name"], position["previous"]
        self._at_iter, self._checkpointed = position["at_iter"], position["saved"]
        if self._checkpointed is not None:
            yield from self._saved(self._checkpointed)
        elif position["count"]:
            self._count = position["count"] - 1
            yield from self._batches(position["record"]["position"], self._name)
        else:
            self._after_iter = position["started"]
            if self._at_iter is None:
                self._start_epoch()
            yield from self._first()

    def _saved(self, state: dict[str, Any]) -> Iterator[Any]:
        """After a checkpoint: the batch that comes next, and the random numbers that come next."""
        self._begin = None
        if state["now"] is not None:
            self._restore(state["now"])
        if state["over"] or state["record"] is None:
            self._start_epoch()
            yield from self._first()
        else:
            self._at_iter = self.capture()
            self._count = state["count"]
            yield from self._batches(_after(state["record"]), self._feed_name())

    def _batches(self, begin: dict[str, Any], name: str) -> Iterator[Any]:
        self._retire(name)
        losses = 0
        while True:
            try:
                if self._feed is None:
                    self._feed = self._open(begin)
                batch, record = self._feed.next()
            except EndOfData as end:
                self._ended = end.after
                return
            except BatchGone:
                self._drop_feed(bye=True)
                self._name = f"{name}/{uuid.uuid4().hex}"  # the others still read from that one
                continue
            except FeederLost as error:
                self._drop_feed(bye=False)
                losses += 1
                if losses == _MOST_LOSSES:
                    raise RuntimeError(
                        f"the loader process was lost {losses} times before batch {self._count} was there: {error}"
                    ) from None
                log.warning("rank %s lost its loader process before batch %s: another is started", self._stream.member, self._count)
                time.sleep(_RETRY_S * losses)  # its name may be taken for a moment
                continue
            losses = 0
            self._take(record)
            begin = _after(record)
            yield _pinned(batch) if self._pin else batch

    def _take(self, record: Any) -> None:
        position, at_iter = record["position"], self._at_iter
        same = at_iter is not None and position["at_iter"]["global"] == at_iter["global"]
        if self._count == 0 and same:  # the feeder began with this rank's generators, or with equal ones
            rng.restore(record["after"]["global"], _CPU)
        news = changed(position["at_iter"].get("scalars", {}), record["after"].get("scalars", {}))
        if news:
            restore_scalars(counting(self._loader), news)
        self._records.append(record)
        self._count += 1
        if self._count > self._config.lookback_length + READ_AHEAD:
            self._release_previous()
            self._stream.settled()

    # ---- feeders

    def _retire(self, name: str) -> None:
        """The feeder of the epoch before stays: a replaced rank may have to go back to its last batch."""
        if self._feed is not None:
            self._release_previous()
            self._previous, self._previous_feed, self._feed = self._name, self._feed, None
        self._name = name

    def _release_previous(self) -> None:
        name, feed = self._previous, self._previous_feed
        self._previous, self._previous_feed = "", None
        if feed is None and name:
            feed = Feed.connect(name, self._stream.member)
        if feed is not None:
            feed.close(bye=True)

    def _drop_feed(self, *, bye: bool) -> None:
        feed, self._feed = self._feed, None
        if feed is not None:
            feed.close(bye=bye)

    def _open(self, begin: dict[str, Any]) -> Feed:
        """Attach to the feeder of that name; whoever comes first starts it."""
        deadline = time.monotonic() + _NAME_S
        while True:
            listener = _bound(self._name)
            if listener is not None:
                shared = self._name.count("/") == self._stream.name.count("/") + 1
                start(Task(self._loader, begin, self._stream.ranks if shared else 1, self._config), listener, self._owner)
            feed = Feed.connect(self._name, self._stream.member)
            if feed is not None:
                feed.attach(self._count)
                return feed
            if listener is not None:
                raise FeederLost("it has ended at once")
            if time.monotonic() > deadline:
                raise RuntimeError(f"the name of the loader process {self._name!r} is taken by one that does not answer")
            time.sleep(_RETRY_S)

    def close(self, *, bye: bool = True) -> None:
        """Stop reading. With `bye` this rank needs nothing more; the loader process ends when all its ranks have said so."""
        self._drop_feed(bye=bye)
        if bye:
            self._release_previous()
        elif self._previous_feed is not None:
            self._previous_feed.close(bye=False)
        self._previous, self._previous_feed = "", None


def _after(record: Any) -> dict[str, Any]:
    """The position whose batch is the one after `record`'s."""
    position, after = record["position"], record["after"]
    own = {"loader": after["loader"], "workers": after["workers"]}
    return {**position, "count": position["count"] + 1, "at_fetch": [after], **own}


def _bound(name: str) -> socket.socket | None:
    """A listener at the feeder's address; None where it is taken."""
    sock = wire.new_socket()
    try:
        sock.bind(wire.address(name))
        sock.listen(64)
    except OSError as error:
        sock.close()
        if error.errno != errno.EADDRINUSE:
            raise
        return None
    not_in_children(sock)
    return sock


def _pinned(batch: Any) -> Any:  # pragma: no cover - needs a GPU
    return tree_map(lambda value: value.pin_memory() if isinstance(value, torch.Tensor) else value, batch)
