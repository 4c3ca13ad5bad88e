"""Shared memory of a node: anonymous files (memfd) that the agent creates and every process inherits.

Seam: the agent owns the file descriptors; the kernel frees the memory when the last holder is gone, so that nothing can stay behind,
also after kill -9 of everybody. One *board* for the node (a row of 64-bit words per rank, and one of the job), and per rank a *ledger*
(rank-local state) and an *arena* (tensors), both `snapshot.slots`, and a *log* of collectives (`snapshot.collective_log`). A spare log
holds what was fetched from logs of other nodes. Ranks are counted within the node here.

The job's row has the minimum of each word over all ranks of all nodes. On one node nobody writes it: ranks look at each other's rows.

Words are aligned 64-bit values written by one owner and read by all; on the supported platforms such a store is atomic and
stores are seen in order. A word that carries a step carries the generation beside it, so that a word from before a recovery never
counts after it. `DONORS` has a bit for each rank of the node that holds, live, all that this rank holds.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable

WORDS_PER_RANK = 9
HEARTBEAT_NS, BOUNDARY, TENSORS, FAULT_NS, FAULTS_FIRED, END_AT, GATE, REPLICATED, DONORS = range(WORDS_PER_RANK)
REPLICATED_AT_GATE = FAULT_NS
"""In the job's row: `REPLICATED` as it was when the last rank reached `GATE`, equal on all nodes: what all ranks may decide by."""
HOLD = HEARTBEAT_NS
"""In the job's row: not 0 while a snapshot in this node's memory is copied for persistent storage, and must not be overwritten."""

_PLACES = 64
_STEP_BITS = 40
ALWAYS = (1 << (_STEP_BITS - 1)) - 1
"""A step that is never reached: the word of what is done for all steps."""


def tag(generation: int, step: int) -> int:
    """Pack a generation and a step (both >= 0) into one word."""
    return (generation << _STEP_BITS) | (step + 1)


def step_of(word: int) -> int:
    """The step in a word, -1 if none was ever written."""
    return (word & ((1 << _STEP_BITS) - 1)) - 1


def pack_places(places: Iterable[int]) -> int:
    """Ranks of a node in one word; those beyond the 64th are left out."""
    return sum(1 << place for place in {*places} if place < _PLACES)


def places_of(word: int) -> list[int]:
    """Inverse of `pack_places`."""
    return [place for place in range(_PLACES) if word >> place & 1]


def reached(word: int, generation: int, step: int) -> bool:
    """Whether `word` says that `step` is reached in this very generation."""
    return word >> _STEP_BITS == generation and (word & ((1 << _STEP_BITS) - 1)) >= step + 1


class Board:
    """The words of all ranks of a node and of the job, mapped from a memfd.

    Args:
        ranks: of this node.
        alone: this node has all ranks of the job.
    """

    def __init__(self, fd: int, ranks: int, *, alone: bool = True) -> None:
        self.ranks, self.alone = ranks, alone
        self.job = ranks
        """Number of the job's row."""
        self._map = mmap.mmap(fd, (ranks + 1) * WORDS_PER_RANK * 8)
        self._words = memoryview(self._map).cast("Q")

    @staticmethod
    def create(ranks: int) -> int:
        """A new zeroed board; returns its file descriptor."""
        fd = os.memfd_create("gemini-board", os.MFD_CLOEXEC)
        os.ftruncate(fd, (ranks + 1) * WORDS_PER_RANK * 8)
        return fd

    def get(self, rank: int, word: int) -> int:
        """One word of one rank."""
        return self._words[rank * WORDS_PER_RANK + word]

    def set(self, rank: int, word: int, value: int) -> None:
        """Write one of this rank's own words."""
        self._words[rank * WORDS_PER_RANK + word] = value

    def least(self, word: int) -> int:
        """The minimum of a word over the ranks of this node."""
        return min(self.get(rank, word) for rank in range(self.ranks))

    def all_reached(self, word: int, generation: int, step: int) -> bool:
        """Whether the `word` of every rank of the job has reached `step` in `generation`."""
        return reached(self.least(word) if self.alone else self.get(self.job, word), generation, step)

    def close(self) -> None:
        """Unmap."""
        self._words.release()
        self._map.close()


def create_files(ranks: int) -> NodeFiles:
    """The board, and a ledger, a log and an arena for each of a node's ranks, and the log of others; all empty."""

    def files(name: str) -> list[int]:
        return [os.memfd_create(f"gemini-{name}-{rank}", os.MFD_CLOEXEC) for rank in range(ranks)]

    others, description = (os.memfd_create(f"gemini-{name}", os.MFD_CLOEXEC) for name in ("others", "description"))
    return NodeFiles(Board.create(ranks), others, description, files("ledger"), files("log"), files("arena"))


class NodeFiles:
    """File descriptors of a node's shared memory."""

    def __init__(self, board: int, others: int, description: int, ledgers: list[int], logs: list[int], arenas: list[int]) -> None:
        self.board, self.ledgers, self.logs, self.arenas = board, ledgers, logs, arenas
        self.others = others
        """A log of collectives fetched from other nodes."""
        self.description = description
        """What rank 0 says of a step that is persisted (`storage.description`)."""

    def all(self) -> list[int]:
        """Every descriptor, for inheritance."""
        return [self.board, self.others, self.description, *self.ledgers, *self.logs, *self.arenas]

    def to_text(self) -> str:
        """For an environment variable of a child that inherits the descriptors."""
        return ",".join(map(str, self.all()))

    @classmethod
    def from_text(cls, text: str) -> NodeFiles:
        """Inverse of `to_text`."""
        board, others, description, *rest = map(int, text.split(","))
        ranks = len(rest) // 3
        return cls(board, others, description, rest[:ranks], rest[ranks : 2 * ranks], rest[2 * ranks :])

    def close(self) -> None:
        """Close this process's descriptors."""
        for fd in self.all():
            os.close(fd)
