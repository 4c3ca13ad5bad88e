"""The keys of one generation, as one rank sees them: those it owns, copies of others' keys, mailboxes.

Seam: `serve(message, asker)` answers a request, of this rank or of a peer; `ask` (given by the node) asks a peer. Every key has an owner,
computed from its name. Writes go to the owner. Reads climb a binomial tree towards it (`bruck.parent`) and leave a copy at each rank
they pass, so that a key that all N ranks read (NCCL's unique id) costs its owner log2 N requests and not N.

Copies stay true: the owner remembers who has read a key and, before it acknowledges an overwrite, has every copy forgotten, also those
that an earlier overwrite is still having forgotten. Versions decide when a copy and the order to forget it cross on their way. Failures:
a rank on the way that died is `PeerLost` at the reader; everything pending is cancelled when the generation ends.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import xxhash

from lightning_gemini.peers import wire
from lightning_gemini.peers.bruck import parent

Ask = Callable[[int, wire.Question], Awaitable[Any]]


class Entry(NamedTuple):
    """A value and the number of the write that made it."""

    version: int
    value: bytes


class Keys:
    """See the module's docstring. Lives in the node's event loop."""

    def __init__(self, rank: int, size: int, ask: Ask) -> None:
        self._rank, self._size, self._ask = rank, size, ask
        self._mine: dict[str, Entry] = {}
        self._writes = 0
        self._waiting: dict[str, asyncio.Event] = {}
        self._copies: dict[str, Entry] = {}
        self._outdated: dict[str, int] = {}
        """Key -> copies of an older version are not to be kept."""
        self._fetches: dict[str, asyncio.Task[Entry]] = {}
        self._readers: defaultdict[str, set[int]] = defaultdict(set)
        self._telling: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        """Key -> its readers are being told that their copies are old."""
        self._boxes: defaultdict[str, deque[list[bytes]]] = defaultdict(deque)
        self._takers: defaultdict[str, deque[asyncio.Future[list[bytes]]]] = defaultdict(deque)

    def owner(self, key: str) -> int:
        """Who keeps a key, or serves as a mailbox for a rank whose number is not known."""
        return xxhash.xxh3_64_intdigest(key.encode()) % self._size

    def post(self, box: str, blocks: list[bytes]) -> None:
        """Fill a mailbox. Posts of two exchanges under one name stay in order."""
        while takers := self._takers.get(box):
            taker = takers.popleft()
            if not takers:
                del self._takers[box]
            if not taker.done():
                return taker.set_result(blocks)
        self._boxes[box].append(blocks)

    def take(self, box: str) -> asyncio.Future[list[bytes]]:
        """Empty a mailbox, now or when something arrives."""
        future: asyncio.Future[list[bytes]] = asyncio.get_running_loop().create_future()
        if blocks := self._boxes.get(box):
            future.set_result(blocks.popleft())
            if not blocks:
                del self._boxes[box]
        else:
            self._takers[box].append(future)
        return future

    async def serve(self, message: wire.Question, asker: int) -> Any:
        """Answer one request."""
        match message:
            case wire.Take():
                return await self.take(message.box)
            case wire.Get():
                return await self._read(message.key, asker)
            case wire.Check():
                return message.key in self._mine
            case wire.Forget():
                await self._forget(message.key, message.version)
            case _:
                return await self._change(message)

    # ---- writing, at the owner

    async def _change(self, message: wire.Change) -> Any:
        old = self._mine.get(message.key)
        before = old.value if old else None
        match message:
            case wire.Put(key, value):
                await self._write(key, value)
            case wire.Add(key, amount):
                total = int(before or b"0") + amount
                await self._write(key, str(total).encode())
                return total
            case wire.Append(key, value):
                await self._write(key, (before or b"") + value)
            case wire.CompareSet(key, expected, desired):
                if before != expected and (before is not None or expected):
                    return expected if before is None else before
                await self._write(key, desired)
                return desired
            case wire.Delete(key):
                await self._write(key, None)
                return before is not None

    async def _write(self, key: str, value: bytes | None) -> None:
        self._writes += 1
        if value is None:
            self._mine.pop(key, None)
        else:
            self._mine[key] = Entry(self._writes, value)
            if key in self._waiting:
                self._waiting.pop(key).set()
        await self._tell_readers(key, self._writes)

    async def _tell_readers(self, key: str, version: int) -> None:
        if key not in self._readers and key not in self._telling:
            return
        async with self._telling[key]:  # the copies that an earlier write is having forgotten are too old for this one, too
            readers = self._readers.pop(key, set())
            try:
                await asyncio.gather(*(self._ask(reader, wire.Forget(key, version)) for reader in readers))
            except BaseException:
                self._readers[key] |= readers  # who has not answered may have its copy yet: the next write tells it again
                raise

    async def _forget(self, key: str, version: int) -> None:
        self._outdated[key] = version
        self._copies.pop(key, None)
        await self._tell_readers(key, version)

    # ---- reading

    async def _read(self, key: str, asker: int) -> Entry:
        entry = await self._present(key) if self.owner(key) == self._rank else await self._copy(key)
        if asker != self._rank:
            self._readers[key].add(asker)
        return entry

    async def _present(self, key: str) -> Entry:
        while key not in self._mine:
            await self._waiting.setdefault(key, asyncio.Event()).wait()
        return self._mine[key]

    async def _copy(self, key: str) -> Entry:
        while key not in self._copies:
            if key not in self._fetches:
                self._fetches[key] = asyncio.create_task(self._fetch(key))
            await asyncio.shield(self._fetches[key])  # others wait for it too
        return self._copies[key]

    async def _fetch(self, key: str) -> Entry:
        try:
            while True:
                version, value = await self._ask(parent(self._rank, self.owner(key), self._size), wire.Get(key))
                if version >= self._outdated.get(key, 0):
                    self._copies[key] = Entry(version, value)
                    return self._copies[key]
        finally:
            del self._fetches[key]

    def close(self) -> None:
        """End what runs here."""
        for task in self._fetches.values():
            task.cancel()
