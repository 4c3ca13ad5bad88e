"""The environment variables by which libraries in a rank's process know which rank it is, by torchrun's names.

Seam: `rank_variables(rank, world, per_node)`. NeMo's `exp_manager` and Lightning's `rank_zero_only` read them long before there is a
Trainer. A spare has those of the last rank until it is given one: it must not take itself for rank 0.
"""

from __future__ import annotations


def rank_variables(rank: int, world: int, per_node: int) -> dict[str, str]:
    """Variables of a rank (0 to world - 1), on a node with `per_node` of them."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % per_node),
        "GROUP_RANK": str(rank // per_node),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(per_node),
    }
