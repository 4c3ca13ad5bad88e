"""Who sends what to whom: Bruck's all-gather and a binomial tree, as pure functions of ranks.

All-gather (J. Bruck et al., "Efficient Algorithms for All-to-All Communications in Multiport Message-Passing Systems", IEEE TPDS 1997):
in round k a member sends all it has, up to 2^k blocks, to the member 2^k before it. After ceil(log2 N) rounds each has all N blocks;
each has sent and received one message a round. Tree: member v (counted from the root) reads through v without its lowest set bit, so
that no member serves more than ceil(log2 N) others and no value travels further than that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Round:
    """One member's part of one round, in group ranks."""

    to: int
    source: int
    count: int
    """Blocks to send: the first `count` of those held. As many arrive."""


def rounds(rank: int, size: int) -> list[Round]:
    """The rounds of member `rank` of `size`."""
    plan = []
    distance = 1
    while distance < size:
        plan.append(Round((rank - distance) % size, (rank + distance) % size, min(distance, size - distance)))
        distance *= 2
    return plan


def in_order(rank: int, blocks: list[T]) -> list[T]:
    """Blocks as member `rank` collected them (its own first, then its successors') -> blocks by rank."""
    start = len(blocks) - rank
    return blocks[start:] + blocks[:start]


def parent(rank: int, root: int, size: int) -> int:
    """Through whom `rank` reads what `root` has; `rank` must not be `root`."""
    distance = (rank - root) % size
    return (root + (distance & (distance - 1))) % size
