"""A script without Lightning whose ranks meet each other directly, without a TCPStore.

    torchrun --nproc-per-node 4 recipes/rendezvous/allreduce.py
    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend gemini --rdzv-endpoint node0,node1 recipes/rendezvous/allreduce.py
    srun --ntasks-per-node 4 --nodes 2 python recipes/rendezvous/allreduce.py

On more than one node all processes need the same LIGHTNING_GEMINI_TOKEN in their environment.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

import lightning_gemini


def main() -> None:
    """Add up the ranks in the whole world and in one half of it."""
    lightning_gemini.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    halves = [dist.new_group(list(range(start, size, 2))) for start in range(min(2, size))]
    device = torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
    whole, half = torch.tensor([float(rank)], device=device), torch.tensor([float(rank)], device=device)
    dist.all_reduce(whole)
    dist.all_reduce(half, group=halves[rank % len(halves)])
    print(f"rank {rank} of {size}: sum of all {whole.item():g}, of my half {half.item():g}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
