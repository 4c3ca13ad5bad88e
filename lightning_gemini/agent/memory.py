"""Shared memory of a node: anonymous files (memfd) that the agent creates and every process inherits.

Seam: the agent owns the file descriptors; the kernel frees the memory when the last holder is gone, so that nothing can stay behind,
also after kill -9 of everybody. One *board* for the node (a row of 64-bit words per rank), and per rank a *ledger*
(rank-local state) and an *arena* (tensors), both `snapshot.slots`, and a *log* of collectives (`snapshot.collective_log`).

Words are aligned 64-bit values written by one owner and read by all; on the supported platforms such a store is atomic and
stores are seen in order. A word that carries a step carries the generation beside it, so that a word from before a recovery never
counts after it.
"""

from __future__ import annotations

import mmap
import os

WORDS_PER_RANK = 8
HEARTBEAT_NS, BOUNDARY, TENSORS, FAULT_NS, FAULTS_FIRED, END_AT = range(6)

_STEP_BITS = 40


def tag(generation: int, step: int) -> int:
    """Pack a generation and a step (both >= 0) into one word."""
    return (generation << _STEP_BITS) | (step + 1)


def step_of(word: int) -> int:
    """The step in a word, -1 if none was ever written."""
    return (word & ((1 << _STEP_BITS) - 1)) - 1


def reached(word: int, generation: int, step: int) -> bool:
    """Whether `word` says that `step` is reached in this very generation."""
    return word >> _STEP_BITS == generation and (word & ((1 << _STEP_BITS) - 1)) >= step + 1


class Board:
    """The words of all ranks of a node, mapped from a memfd."""

    def __init__(self, fd: int, world: int) -> None:
        self.world = world
        self._map = mmap.mmap(fd, world * WORDS_PER_RANK * 8)
        self._words = memoryview(self._map).cast("Q")

    @staticmethod
    def create(world: int) -> int:
        """A new zeroed board; returns its file descriptor."""
        fd = os.memfd_create("gemini-board", os.MFD_CLOEXEC)
        os.ftruncate(fd, world * WORDS_PER_RANK * 8)
        return fd

    def get(self, rank: int, word: int) -> int:
        """One word of one rank."""
        return self._words[rank * WORDS_PER_RANK + word]

    def set(self, rank: int, word: int, value: int) -> None:
        """Write one of this rank's own words."""
        self._words[rank * WORDS_PER_RANK + word] = value

    def all_reached(self, word: int, generation: int, step: int) -> bool:
        """Whether every rank's `word` has reached `step` in `generation`."""
        return all(reached(self.get(rank, word), generation, step) for rank in range(self.world))

    def close(self) -> None:
        """Unmap."""
        self._words.release()
        self._map.close()


def create_files(world: int) -> NodeFiles:
    """The board, and a ledger, a log and an arena for each of `world` ranks, empty."""

    def files(name: str) -> list[int]:
        return [os.memfd_create(f"gemini-{name}-{rank}", os.MFD_CLOEXEC) for rank in range(world)]

    return NodeFiles(Board.create(world), files("ledger"), files("log"), files("arena"))


class NodeFiles:
    """File descriptors of a node's shared memory."""

    def __init__(self, board: int, ledgers: list[int], logs: list[int], arenas: list[int]) -> None:
        self.board, self.ledgers, self.logs, self.arenas = board, ledgers, logs, arenas

    def all(self) -> list[int]:
        """Every descriptor, for inheritance."""
        return [self.board, *self.ledgers, *self.logs, *self.arenas]

    def to_text(self) -> str:
        """For an environment variable of a child that inherits the descriptors."""
        return ",".join(map(str, self.all()))

    @classmethod
    def from_text(cls, text: str) -> NodeFiles:
        """Inverse of `to_text`."""
        board, *rest = map(int, text.split(","))
        world = len(rest) // 3
        return cls(board, rest[:world], rest[world : 2 * world], rest[2 * world :])

    def close(self) -> None:
        """Close this process's descriptors."""
        for fd in self.all():
            os.close(fd)
