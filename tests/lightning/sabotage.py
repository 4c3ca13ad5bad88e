"""Faults at places that `lightning_gemini.faults` does not name: the test's own models and callbacks ask `Saboteur` whether to die here.

Each strike leaves a marker before it strikes, so that it happens once in the life of the job, and the test can count them.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path


class Struck(RuntimeError):
    """Raised by a strike of kind "raise"."""


@dataclass(frozen=True)
class Strike:
    where: str
    rank: int
    count: int = 0
    """How often the rank passes this place before it strikes."""
    kind: str = "kill"


class Saboteur:
    def __init__(self, directory: Path, strikes: tuple[Strike, ...]) -> None:
        self._directory, self._strikes = directory, strikes
        self._passed: dict[int, int] = {}

    def __call__(self, where: str, rank: int, at: int | None = None) -> None:
        """`at` names the visit (a batch index, say) where the count of this process's visits would not."""
        for number, strike in enumerate(self._strikes):
            if (strike.where, strike.rank) != (where, rank):
                continue
            visit = self._passed.get(number, 0) if at is None else at
            self._passed[number] = self._passed.get(number, 0) + 1
            marker = self._directory / f"struck-{number}"
            if visit == strike.count and not marker.exists():
                marker.touch()
                if strike.kind == "raise":
                    raise Struck(f"{strike}")
                os.kill(os.getpid(), signal.SIGKILL)


def struck(directory: Path) -> int:
    return len(list(directory.glob("struck-*")))
