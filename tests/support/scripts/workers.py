"""A worker of torchrun that knows nothing of hosts and ports, and tells what it saw: `workers.py <directory> <way>`."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from tests.support.sockets import tcp_sockets, uses


def main(directory: Path, way: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    rank, start = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"]
    (directory / f"started-{rank}-{start}-{os.getpid()}").touch()
    if way == "fails" and os.environ["GROUP_RANK"] == "1" and not list(directory.glob("failed*")):
        (directory / "failed").touch()
        raise SystemExit(3)
    node = None
    if way == "env":
        dist.init_process_group("gloo", init_method="env://")
    else:
        import lightning_gemini
        from lightning_gemini.rendezvous import initialize

        lightning_gemini.init_process_group("gloo", timeout_s=60.0)
        node = initialize._Process.node
    tensor = torch.tensor([2**rank])
    dist.all_reduce(tensor)
    seen = {
        "sum": int(tensor),
        "world": dist.get_world_size(),
        "master_port": uses(int(os.environ["MASTER_PORT"])),
        "agent_listens": [sock.address for sock in tcp_sockets(os.getppid()) if sock.listens],
        "generation": node.generation if node else None,
        "unix": bool(node and node.address.is_unix),
    }
    (directory / f"rank{rank}.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
