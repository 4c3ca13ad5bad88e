"""`lightning-gemini run` and `python -m lightning_gemini.agent`: a command line becomes a supervised job."""

from __future__ import annotations

import argparse
import os
import sys

from lightning_gemini.agent.spawn import ExecSpawner
from lightning_gemini.agent.supervisor import Supervisor


def parser() -> argparse.ArgumentParser:
    """The options of `run`."""
    parser = argparse.ArgumentParser(prog="lightning-gemini run", description="Run a script under the node agent, one process per rank.")
    parser.add_argument("--nproc-per-node", type=int, required=True, metavar="N", help="ranks on this node, as the Trainer's devices")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="script.py and its arguments, or a whole command after --")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a job; returns its exit status."""
    options = parser().parse_args(arguments)
    if options.nproc_per_node < 2:
        print(
            f"lightning-gemini: --nproc-per-node={options.nproc_per_node}: a rank can only be recovered by others, give 2 or more",
            file=sys.stderr,
        )
        return 2
    command = options.command
    if command[:1] == ["--"]:
        command = command[1:]
    elif command:
        command = [sys.executable, *command]
    if not command:
        print("lightning-gemini: no script given: lightning-gemini run --nproc-per-node 4 train.py", file=sys.stderr)
        return 2
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.nproc_per_node)))
    return Supervisor(ExecSpawner(command), options.nproc_per_node).run()
