"""A worker of torchrun that knows nothing of hosts and ports, and tells what it saw: `workers.py <directory> <way>`."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
import lightning_gemini
from lightning_gemini.rendezvous import initialize
from tests.support.sockets import tcp_sockets, uses


def main(directory: Path, way: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    rank, start = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"]
    (directory / f"started-{rank}-{start}-{os.getpid()}").touch()
    if way == "fails" and rank == int(os.environ["WORLD_SIZE"]) - 1 and not (directory / "failed").exists():
        (directory / "failed").touch()
        raise SystemExit(3)
    lightning_gemini.init_process_group("gloo", timeout_s=60.0)
    node = initialize._Process.node
    assert node is not None
    tensor = torch.tensor([2**rank])
    dist.all_reduce(tensor)
    seen = {
        "sum": int(tensor),
        "world": dist.get_world_size(),
        "master_port": uses(int(os.environ["MASTER_PORT"])),
        "agent_listens": [sock.address for sock in tcp_sockets(os.getppid()) if sock.listens],
        "generation": node.generation,
        "unix": node.address.is_unix,
    }
    dist.barrier()
    dist.destroy_process_group()
    if way == "then env":
        dist.init_process_group("gloo", init_method="env://")
        seen["master_port_of_env"] = uses(int(os.environ["MASTER_PORT"]))
    (directory / f"rank{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
