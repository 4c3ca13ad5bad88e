"""Runs real jobs: a forked agent, forked ranks, real signals. The parent (pytest) has torch and lightning imported already."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_gemini.agent.spawn import ForkSpawner
from lightning_gemini.agent.supervisor import Supervisor
from lightning_gemini.telemetry.events import read_events
from lightning_gemini.telemetry.report import summarize
from tests.support.storing import storage_process


@dataclass
class Result:
    """What a job left behind."""

    directory: Path
    exit_status: int
    output: str
    ranks: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def agent_events(self) -> list[dict[str, Any]]:
        return read_events(str(self.directory / "gemini" / "agent.jsonl"))

    @property
    def injected(self) -> int:
        return sum(
            event["event"] == "fault_injected"
            for path in (self.directory / "gemini").glob("rank*.jsonl")
            for event in read_events(str(path))
        )

    def pids(self) -> dict[int, list[int]]:
        """The processes that were each rank, in order."""
        return summarize(str(self.directory / "gemini")).pids

    @property
    def recoveries(self) -> list[dict[str, Any]]:
        return [event for event in self.agent_events if event["event"] == "recovered"]


def run_job(
    directory: Path, target: Callable[[], None], world: int, timeout_s: float = 100.0, during: Callable[[int], None] | None = None
) -> Result:
    """Run `target` in `world` ranks under an agent in a child process; `during(agent_pid)` may disturb it."""
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "output.txt"
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.setsid()
            fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(fd, 1)
            os.dup2(fd, 2)
            sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            os.chdir(directory)
            found = Supervisor(ForkSpawner(target), world, storage=storage_process).run()
            code = 99 if found is None else found
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    deadline = time.monotonic() + timeout_s
    status: int | None = None
    if during is not None:
        during(pid)
    while status is None:
        done, raw = os.waitpid(pid, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(raw)
        elif time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError(f"job in {directory} did not end:\n{log.read_text()[-6000:]}")
        else:
            time.sleep(0.01)
    ranks = {int(p.stem[4:]): json.loads(p.read_text()) for p in directory.glob("rank*.json")}
    return Result(directory, status, log.read_text(), ranks)


def digest(tensors: list[torch.Tensor]) -> str:
    """sha256 of local tensors."""
    hasher = hashlib.sha256()
    for tensor in tensors:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        hasher.update(local.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


class Recorder(pl.Callback):
    """Losses of every step as exact bits, state digests at the end."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.losses: dict[str, str] = {}
        self.pid = os.getpid()

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses = state_dict["losses"]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) and "loss" in outputs else torch.zeros(())
        self.losses[f"{trainer.current_epoch}/{batch_idx}"] = struct.pack("<f", float(loss)).hex()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        optimizers = [getattr(o, "optimizer", o) for o in trainer.strategy.optimizers]
        moments = [v for o in optimizers for p in o.state.values() for _, v in sorted(p.items()) if isinstance(v, torch.Tensor)]
        record = {
            "losses": self.losses,
            "params": digest(list(pl_module.parameters())),
            "buffers": digest(list(pl_module.buffers())),
            "optimizer": digest(moments),
            "lr": [g["lr"] for o in optimizers for g in o.param_groups],
            "steps": trainer.global_step,
            "epoch": trainer.current_epoch,
            "metrics": {k: float(v) for k, v in sorted(trainer.callback_metrics.items())},
            "rng": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
            "pid": os.getpid(),
            "objects": getattr(pl_module, "objects", None),
        }
        path = Path(self.directory) / f"rank{trainer.global_rank}.json"
        path.write_text(json.dumps(record))


VOLATILE = {"pid", "objects"}


def same(a: Result, b: Result) -> None:
    """Assert bit-identity of two jobs."""
    assert a.exit_status == 0, a.output[-6000:]
    assert b.exit_status == 0, b.output[-6000:]
    assert a.ranks.keys() == b.ranks.keys() and a.ranks
    for rank in a.ranks:
        for key in a.ranks[rank]:
            if key not in VOLATILE:
                assert a.ranks[rank][key] == b.ranks[rank][key], f"rank {rank}: {key} differs"
