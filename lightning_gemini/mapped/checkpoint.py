"""The loader's part of a checkpoint: one entry per rank, because each reads other data and draws other numbers.

Seam: `pack(own)` gathers from all ranks (Lightning saves checkpoints on all of them, and writes rank 0's), `unpack` finds this rank's
own. With another number of ranks only the end of an epoch can be resumed.
Entries are byte tensors, which also a `weights_only` load accepts. Failures: a state that is not of this kind, or of another number
of ranks in mid-epoch -> `ValueError` that says what to do.
"""

from __future__ import annotations

import pickle
from typing import Any

import torch
import torch.distributed as dist

_KEY = "lightning_gemini_data"
_VERSION = 1


def pack(own: dict[str, Any]) -> dict[str, Any]:
    """State of all ranks."""
    data = pickle.dumps(own)
    everyone: list[Any] = [data]
    if dist.is_available() and dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, data)
    return {"version": _VERSION, _KEY: [torch.frombuffer(bytearray(item), dtype=torch.uint8) for item in everyone]}


def unpack(state: dict[str, Any]) -> dict[str, Any]:
    """This rank's."""
    if _KEY not in state:
        raise ValueError(
            f"the checkpoint's loader state has the keys {sorted(state)}: it was not saved with mapped data; resume it without, "
            "or from a checkpoint at the end of an epoch"
        )
    if state.get("version") != _VERSION:
        raise ValueError(
            f"the checkpoint's loader state has version {state.get('version')}, this is {_VERSION}: resume it with the version of "
            "lightning_gemini that saved it, or from a checkpoint at the end of an epoch without its loader state"
        )
    entries = state[_KEY]
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
    found: dict[str, Any] = pickle.loads(entries[rank % len(entries)].numpy().tobytes())
    if len(entries) == world:
        return found
    if found["over"]:
        return {**found, "now": None, "record": None}  # nobody's random numbers
    raise ValueError(
        f"the checkpoint was saved in the middle of an epoch by {len(entries)} ranks, this job has {world}: "
        f"resume it with {len(entries)}, or from a checkpoint at the end of an epoch"
    )
