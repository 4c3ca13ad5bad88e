"""Forked ranks that initialise process groups, each in an environment as a launcher makes it."""

from __future__ import annotations

import os
import random
import signal
import socket
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist

from tests.support.forked import Ranks, Tell
from tests.support.peers import new_job

LIMIT_S = 40


def told(body: Callable[[int], object], size: int, environ: Mapping[str, str] | None = None, ranks: int | None = None) -> list[str]:
    """What `body` returns in each rank of a new job, or its error, in one line. `ranks`: how many of the `size` are started."""
    environ = {"WORLD_SIZE": str(size), "LIGHTNING_GEMINI_JOB": new_job(), "GLOO_SOCKET_IFNAME": "lo", **(environ or {})}

    def one(rank: int, tell: Tell) -> None:
        os.environ.update(environ, RANK=str(rank))
        try:
            answer = str(body(rank))
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        tell(" ".join(answer.split()))
        signal.pause()  # a rank that left would take the keys it owns with it, and others may not be that far

    processes = Ranks(one, size if ranks is None else ranks, LIMIT_S)
    try:
        return [processes.hear(rank) for rank in range(len(processes.pids))]
    finally:
        processes.end()


def summed(rank: int, group: dist.ProcessGroup | None = None) -> int:
    """All-reduces 2**rank: the bits of the answer say who took part."""
    tensor = torch.tensor([2**rank])
    dist.all_reduce(tensor, group=group)
    return int(tensor)


def free_port(span: int = 1) -> int:
    """First of `span` free ports below those that outgoing connections take at random."""
    while True:
        first = random.randrange(10000, 16000)
        try:
            for port in range(first, first + span):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
