"""The memory of this node's own ranks, as the exchange's threads see it: arenas and logs of collectives.

Seam: `hold` names the descriptors (they stay the caller's; duplicates are kept, so that a caller who closes his harms nobody); `arena` and
`log` open one. A rank may give its arena another size at any time: a mapping is used again only while it fits the file.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping

from lightning_gemini.snapshot.collective_log import CollectiveLog
from lightning_gemini.snapshot.slots import SlotFile


class Held:
    """Descriptors by rank."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arenas: dict[int, int] = {}
        self._logs: dict[int, int] = {}
        self._mapped: dict[int, SlotFile] = {}

    def hold(self, files: Mapping[int, int]) -> None:
        """These are the arenas now."""
        with self._lock:
            self._arenas = _replaced(self._arenas, files)
            self._mapped.clear()  # a mapping that somebody uses ends with its last view

    def hold_logs(self, files: Mapping[int, int]) -> None:
        """These are the logs now."""
        with self._lock:
            self._logs = _replaced(self._logs, files)

    def arena(self, rank: int) -> SlotFile | None:
        """The arena of a rank of this node, None if it is none or has no size yet. Shared: the caller must not close it."""
        with self._lock:
            if rank not in self._arenas:
                return None
            fresh, known = SlotFile(self._arenas[rank]), self._mapped.get(rank)
            if not fresh.capacity:  # also while its owner gives it another size
                return None
            if known is not None and (known.capacity, len(known.memory)) == (fresh.capacity, len(fresh.memory)):
                fresh.close()  # page tables of gigabytes are dear: the known mapping has them
                return known
            self._mapped[rank] = fresh
            return fresh

    def results(self, rank: int, groups: Mapping[str, int]) -> dict[tuple[str, int], bytes | None]:
        """What a rank's log has of some groups, from an index of each on. Raises `LookupError` for a rank of another node."""
        with self._lock:
            if rank not in self._logs:
                raise LookupError(f"rank {rank} keeps no log of collectives here")
            log = CollectiveLog(self._logs[rank])
        try:
            return {(group, index): data for (group, index), data in log.results().items() if index >= groups.get(group, 1 << 63)}
        finally:
            log.close()

    def close(self) -> None:
        """Close the duplicates."""
        self.hold({})
        self.hold_logs({})


def _replaced(old: Mapping[int, int], new: Mapping[int, int]) -> dict[int, int]:
    found = {rank: os.dup(fd) for rank, fd in new.items()}
    for fd in old.values():
        os.close(fd)
    return found
