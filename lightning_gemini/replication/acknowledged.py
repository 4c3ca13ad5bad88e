"""Which versions other nodes have acknowledged: by rank and node, the two newest steps (a node has two slots for each rank)."""

from __future__ import annotations

import threading
from collections.abc import Set

_SLOTS = 2


class Acknowledged:
    """Written by the senders' threads, read by the agent's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._steps: dict[tuple[int, str], list[int]] = {}

    def add(self, rank: int, node: str, step: int) -> None:
        """One more."""
        with self._lock:
            known = self._steps.get((rank, node), [])
            self._steps[rank, node] = sorted({*known, step})[-_SLOTS:]

    def newest(self, rank: int, node: str) -> int:
        """-1 for none."""
        with self._lock:
            return max(self._steps.get((rank, node), []), default=-1)

    def keep_only(self, nodes: Set[str]) -> None:
        """The others are gone."""
        with self._lock:
            self._steps = {(rank, node): steps for (rank, node), steps in self._steps.items() if node in nodes}

    def forget_after(self, step: int) -> None:
        """A recovery went back."""
        with self._lock:
            self._steps = {key: [known for known in steps if known <= step] for key, steps in self._steps.items()}
