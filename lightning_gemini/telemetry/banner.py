"""The start-up banner: what survives what, and what it takes."""

from __future__ import annotations

import sys

from lightning_gemini.config import GeminiConfig
from lightning_gemini.memory_size import available_memory
from lightning_gemini.state.ownership import Layout

_MIB = 1 << 20


def text(config: GeminiConfig, layout: Layout, need: int, donors: bool, available: int) -> str:
    """The banner's lines. `need`: bytes of snapshot memory on each node. `donors`: see `GeminiBase.has_donors`."""
    source = "a live replica, else this node's memory" if donors else "this node's memory"
    every, several = config.snapshot.every_n_steps, layout.nodes > 1
    where = f"{layout.world} ranks on {layout.nodes} nodes" if several else f"{layout.world} ranks on this node"
    nothing = f"back to {config.persistent.url}" if config.persistent.url else "the job ends, resume from your checkpoint"
    whole, snapshots = "spares start from this node's memory", f"a snapshot every {every} step(s)"
    if not every:
        source = f"a live replica, else {nothing}" if donors else nothing
        whole, snapshots = nothing, "no snapshots in memory"
    lines = [
        f"lightning_gemini: {where}, {config.recovery.spares} warm spare(s){' each' * several}, {snapshots}",
        f"  a rank raises in a step      it rejoins in its own process; state from {source}",
        f"  a rank dies or is stopped    a spare takes its rank; the others keep their processes; state from {source}",
        f"  all ranks of a node die      {whole}",
    ]
    if several:
        lines += [
            f"  a node is lost               a spare node takes its ranks; state from {_of_a_lost_node(config) if every else nothing}",
            "  an agent dies                as if its node was lost",
        ]
    else:
        lines.append("  the agent dies               the job ends, nothing is left behind")
    if config.persistent.url:
        stored = config.persistent
        lines.append(f"  everything else              back to {stored.url}, written every {stored.every_n_steps} steps")
    lines.append(f"  memory: {need / _MIB:.0f} MiB of each node for snapshots, {available / _MIB:.0f} MiB available")
    lines += [f"  FAULT ARMED: {fault.kind} rank {fault.rank} in step {fault.step}, {fault.where}" for fault in config.faults]
    return "\n".join(lines)


def show(config: GeminiConfig, layout: Layout, need: int, donors: bool) -> None:
    """Print it."""
    print(text(config, layout, need, donors, available_memory()), file=sys.stderr, flush=True)


def _of_a_lost_node(config: GeminiConfig) -> str:
    if config.replication.copies > 1:
        return "other nodes' memory"
    return "persistent storage" if config.persistent.url else "nowhere, the job ends: set replication.copies or persistent.url"
