"""The checkpoint that a job was given to go on from, by the user or by NeMo's `exp_manager`: of which step it is.

Seam: `step_of(path)`. Where persistent storage has a checkpoint too, the newer one wins, and both are named. Failure: what cannot be read
here (another format, a word such as "last") has step -1 and so is the older one; if nothing else is there Lightning loads it, or says why
it cannot.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

_META = ("meta.pt", "common.pt")
"""What Lightning and Megatron put beside the tensors of a sharded checkpoint."""


def step_of(path: str) -> int:
    """`global_step` of a Lightning checkpoint, -1 where it cannot be told. The file is trusted as Lightning does, which loads it next."""
    found = Path(path)
    files = [found / name for name in _META if (found / name).is_file()] if found.is_dir() else [found]
    try:
        checkpoint: Any = torch.load(files[0], map_location="cpu", mmap=True, weights_only=False)
        return int(checkpoint["global_step"])
    except (IndexError, KeyError, TypeError, ValueError, OSError, RuntimeError, pickle.UnpicklingError):
        return -1


def is_gone(path: str) -> bool:
    """Whether a path was of a local file that is not there any more: it may have been a rolling checkpoint, such as `last.ckpt`."""
    return os.path.isabs(path) and not os.path.exists(path)
