"""How much snapshot memory is needed, before the first step. Pure but for the question what is free.

Failure: not enough -> `MemoryError` with both figures.
"""

from __future__ import annotations

from lightning_gemini.memory_size import available_memory
from lightning_gemini.snapshot import blocks
from lightning_gemini.state.ownership import Layout, Owned

_MIB = 1 << 20


def of_slot(largest: Owned, usual: Owned, entries: int, made: bool, chunk: int) -> int:
    """Bytes of the largest slot. `made`: the optimizers have their state; before that it counts as two more copies of what they train."""
    sure = sum(part.length for part, _ in largest.parts)
    trained = sum(part.length for part, _ in usual.parts if part.name.startswith("param/"))
    return blocks.size_of_slot(sure + (0 if made else 2 * trained) + 320 * entries * 3 + (1 << 16) + 2 * chunk, 0, chunk)


def of_node(slot: int, mine: Owned, layout: Layout) -> int:
    """Bytes of a whole node: two slots of each of its ranks, and two for each replica that it keeps of others."""
    sizes = [part.length for part, _ in mine.parts]
    travelling = sum(sizes[: mine.travelling]) / max(1, sum(sizes)) if layout.nodes > 1 else 0.0
    return int(2 * slot * layout.per_node * (1 + travelling * (layout.copies - 1)))


def require(need: int, layout: Layout) -> None:
    """Raise `MemoryError` where that is not available."""
    available = available_memory()  # all ranks of the node ask at the same time
    if need > available:
        raise MemoryError(
            f"two snapshot slots for each of {layout.per_node} ranks, and for what peers send, need {need / _MIB:.0f} MiB, "
            f"{available / _MIB:.0f} MiB of memory are available: "
            "use fewer ranks per node, a smaller model, or a node with more memory"
        )
