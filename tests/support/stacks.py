"""What the processes of a job that hangs are doing, for the message of the test that has waited for them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Iterable

from lightning_gemini.agent.memory import BOUNDARY, GATE, REPLICATED, TENSORS, step_of, tag
from lightning_gemini.agent.supervisor import Supervisor

_INNER = 7
"""Lines of each stack."""


def signal_all(pids: Iterable[int], number: signal.Signals) -> None:
    """One after the other, so that what they write does not mix; nothing tells when they have."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        time.sleep(0.05)


def brief(frames: str) -> str:
    """The inner ends of stacks, as faulthandler prints them."""
    stacks = [re.sub(r' *File ".*/((?:[^/"]*/)?[^/"]*)", line ', r"  \1:", stack) for stack in frames.split("\n\n")]
    return "\n".join("\n".join(stack.strip().splitlines()[:_INNER]) for stack in stacks)


def tell_votes(supervisor: Supervisor) -> None:
    """In an agent: the words of its ranks, of its children and of all, as generation:step."""
    coordinator = supervisor.node.coordinator
    lines = [f"generation {coordinator.number} at index {coordinator.index}"]
    for place in (*range(supervisor.ranks_per_node), coordinator.board.job):
        lines.append(f"board {place}: {_words(coordinator.board.get(place, word) for word in (BOUNDARY, TENSORS, GATE, REPLICATED))}")
    mesh = getattr(coordinator.others, "mesh", None)
    if mesh is not None and mesh._votes is not None:
        lines.append(f"connected: {sorted(mesh._connections)} result: {_words(mesh._votes.result.words)}")
        lines += [f"heard of {index}: {_words(words)}" for index, words in mesh._votes._words.items()]
    print("\n".join(lines), file=sys.stderr, flush=True)


def _words(words: Iterable[int]) -> str:
    return " ".join(f"{(word - tag(0, step_of(word))) >> 40}:{step_of(word)}" for word in words)
