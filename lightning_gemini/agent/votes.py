"""What all ranks of all nodes have reached: the minimum of their words, up a tree of nodes and down again. Pure, no I/O.

On one node ranks look at each other's words in shared memory. Across nodes each agent sends the minimum over its own ranks and the nodes
below it to its parent; the root (index 0) sends the minimum over all back down, where agents write it into the job's row of their boards.
With `FANOUT` children each, N nodes are 2 * log_FANOUT(N) hops from a rank's word to the last rank's eyes. Words carry their generation,
and so does each message: one of another generation is dropped.

The root takes one decision that all ranks must take alike: `replicated` as it was when the last rank reached the gate, once per step.

Failure: a node that is gone stops the minimum; its neighbours in the tree notice, and a recovery begins with a new tree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

FANOUT = 8


class Words(NamedTuple):
    """The minimum over some ranks; each a `memory.tag`, comparable because the generation is in front."""

    boundary: int = 0
    tensors: int = 0
    gate: int = 0
    replicated: int = 0
    written: int = 0
    """Of persistent storage: a node's part of the checkpoint of a step."""
    end_at: int = 0
    """Not a minimum. Upwards: 1 asks for the end of the job. Downwards: the step after which all ranks end, 0 for none."""


class Result(NamedTuple):
    """The minimum over all ranks, and what the root has decided."""

    words: Words = Words()
    replicated_at_gate: int = 0
    complete: int = 0
    """Not a minimum: the newest complete checkpoint."""


def parent(index: int) -> int | None:
    """The node above, None for the root."""
    return (index - 1) // FANOUT if index else None


def children(index: int, count: int) -> list[int]:
    """The nodes below."""
    return list(range(FANOUT * index + 1, min(FANOUT * index + FANOUT + 1, count)))


class Votes:
    """One node's part in one generation.

    Args:
        up: sends this node's words to its parent.
        down: sends a result to all children and to this node's own board.
        end_after: from the minimum boundary, the word of the step after which all may end.
    """

    def __init__(
        self, index: int, count: int, up: Callable[[Words], None], down: Callable[[Result], None], end_after: Callable[[int], int]
    ) -> None:
        self._root = index == 0
        self._words: dict[int, Words] = {index: Words(), **{child: Words() for child in children(index, count)}}
        self._own, self._up, self._down, self._end_after = index, up, down, end_after
        self._sent = Words()
        self.result = Result()

    def own(self, words: Words) -> None:
        """The minimum over this node's ranks has changed."""
        self.heard(self._own, words)

    def heard(self, index: int, words: Words) -> None:
        """A child says; or, again, this node itself."""
        if index in self._words:
            self._words[index] = words
            self._pass_on()

    def told(self, result: Result) -> None:
        """The parent says."""
        self.result = result
        self._down(result)

    def completed(self, word: int) -> None:
        """At the root: a checkpoint is complete."""
        self.told(self.result._replace(complete=word))

    def repeat(self) -> None:
        """A connection was made anew: whoever is there must hear it all."""
        if not self._root:
            self._up(self._sent)
        self._down(self.result)

    def _pass_on(self) -> None:
        rows = self._words.values()
        least = Words(*map(min, zip(*rows, strict=True)))._replace(end_at=max(row.end_at for row in rows))
        if least == self._sent:
            return
        self._sent = least
        if self._root:
            self._decide(least)
        else:
            self._up(least)

    def _decide(self, least: Words) -> None:
        before = self.result
        replicated = least.replicated if least.gate > before.words.gate else before.replicated_at_gate
        known = least.end_at and least.boundary  # not before all have said how far they are
        end_at = before.words.end_at or (self._end_after(least.boundary) if known else 0)
        self.told(Result(least._replace(end_at=end_at), replicated, before.complete))
