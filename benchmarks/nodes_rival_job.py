"""One of two processes that save and replicate with lm-resiliency; for an interpreter that has it, which need not have ours.

Prints JSON: seconds until `save_tensors` returned, until the peer's copy was there too, and CPU seconds of this process, for each save.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from lm_resiliency.checkpointing import config, manager

_PIECES = 24
_MIB = 1 << 20


def main() -> None:
    """Arguments: a folder that may be used, rank, port, MiB of state, saves."""
    folder, (rank, port, mib, repeat) = sys.argv[1], map(int, sys.argv[2:])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    tensors = [torch.rand(mib * _MIB // 4 // _PIECES) for _ in range(_PIECES)]
    options = config.InMemoryCkptConfig(interval=1, disk_flush_interval=0, disk_folder=folder, run_id="benchmark", pin_memory=False)
    saver: Any = manager.InMemoryCheckpointManager(options)
    found = [_save(saver, tensors, step) for step in range(1, repeat + 3)][2:]  # both slots have been written once
    print(json.dumps(found), flush=True)
    dist.destroy_process_group()


def _save(saver: Any, tensors: list[torch.Tensor], step: int) -> tuple[float, float, float]:
    dist.barrier()
    began, cpu = time.perf_counter(), time.process_time()
    saver.save_tensors(tensors, step)
    returned = time.perf_counter() - began
    if not saver.finalize_replication():
        raise RuntimeError(f"step {step} was not replicated")
    return returned, time.perf_counter() - began, time.process_time() - cpu


if __name__ == "__main__":
    main()
