"""The start-up banner: what survives what, and what it takes."""

from __future__ import annotations

import sys

from lightning_gemini.config import GeminiConfig
from lightning_gemini.recovery.memory import available_memory

_MIB = 1 << 20


def text(config: GeminiConfig, world: int, slot_bytes: int, replicated: bool, available: int) -> str:
    """The banner's lines."""
    need = 2 * slot_bytes * world
    source = "a live replica, else this node's memory" if replicated else "this node's memory"
    every = config.snapshot.every_n_steps
    lines = [
        f"lightning_gemini: {world} ranks on this node, {config.recovery.spares} warm spare(s), a snapshot every {every} step(s)",
        f"  a rank raises in a step      it rejoins in its own process; state from {source}",
        f"  a rank dies or is stopped    a spare takes its rank; the others keep their processes; state from {source}",
        "  all ranks die                spares start from this node's memory",
        "  the agent dies               the job ends, nothing is left behind",
        f"  memory: {need / _MIB:.0f} MiB for two slots of each rank's share, {available / _MIB:.0f} MiB available",
    ]
    lines += [f"  FAULT ARMED: {fault.kind} rank {fault.rank} in step {fault.step}, {fault.where}" for fault in config.faults]
    return "\n".join(lines)


def show(config: GeminiConfig, world: int, slot_bytes: int, replicated: bool) -> None:
    """Print it."""
    print(text(config, world, slot_bytes, replicated, available_memory()), file=sys.stderr, flush=True)
