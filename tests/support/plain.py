"""Runs the same script under Lightning's own DDP: forked ranks, no agent. What `jobs.run_job` is compared with."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.support.jobs import Result


def run_plain(directory: Path, target: Callable[[], None], world: int, timeout_s: float = 100.0) -> Result:
    """Run `target` in `world` processes that find each other as Lightning's DDP does; the Trainer is given `strategy="ddp"`."""
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "output.txt"
    port = _free_port()
    waiting = {_start(directory, log, target, world, rank, port): rank for rank in range(world)}
    deadline, status = time.monotonic() + timeout_s, 0
    while waiting:
        for pid in list(waiting):
            done, raw = os.waitpid(pid, os.WNOHANG)
            if done:
                del waiting[pid]
                status = status or os.waitstatus_to_exitcode(raw)
        if waiting and (time.monotonic() > deadline or status):  # peers of a failed rank would wait for it
            for pid in waiting:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            waiting.clear()
            status = status or 99
        time.sleep(0.01)
    ranks = {int(path.stem[4:]): json.loads(path.read_text()) for path in directory.glob("rank*.json")}
    return Result(directory, status, log.read_text(), ranks)


def _start(directory: Path, log: Path, target: Callable[[], None], world: int, rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        os.chdir(directory)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "NODE_RANK": "0",
                       "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
        target()
        status = 0
    except SystemExit as end:  # as the interpreter does
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
