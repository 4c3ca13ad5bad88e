"""There is no server: no process of a job has a TCPStore, and rank 0 is like any other."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil
import torch.distributed as dist

from lightning_gemini import GeminiStrategy
from tests.support.jobs import Recorder, Result, run_job
from tests.support.models import Net, loader
from tests.support.plain import run_plain

WORLD = 3


class Sockets(pl.Callback):
    """Writes down the TCP sockets of this rank and of its parent at the end of each epoch."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        def sockets(pid: int) -> list[tuple[str, int, int]]:
            found = psutil.Process(pid).net_connections("tcp")
            return [(c.status, c.laddr.port, c.raddr.port if c.raddr else 0) for c in found]

        record = {"rank": sockets(os.getpid()), "agent": sockets(os.getppid())}
        (self.directory / f"sockets{trainer.current_epoch}-{trainer.global_rank}.json").write_text(json.dumps(record))


def train(directory: Path, strategy: Any) -> None:
    pl.seed_everything(1)
    trainer = pl.Trainer(
        accelerator="cpu", devices=WORLD, strategy=strategy, max_epochs=2, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, logger=False, default_root_dir=str(directory), callbacks=[Recorder(str(directory)), Sockets(directory)],
    )  # fmt: skip
    trainer.fit(Net(), loader())
    dist.destroy_process_group()


def records(directory: Path, epoch: int) -> list[dict[str, Any]]:
    return [json.loads((directory / f"sockets{epoch}-{rank}.json").read_text()) for rank in range(WORLD)]


def listeners(sockets: list[Any]) -> set[int]:
    return {local for status, local, _ in sockets if status == psutil.CONN_LISTEN}


def only_gloo(found: list[dict[str, Any]]) -> bool:
    """Each rank listens at one port (gloo's), and every connection has a rank's listener at one end."""
    ports = [listeners(record["rank"]) for record in found]
    gloo = set().union(*ports)
    ended = {psutil.CONN_TIME_WAIT, psutil.CONN_LISTEN}
    connections = [(local, remote) for record in found for status, local, remote in record["rank"] if status not in ended]
    return all(len(port) == 1 for port in ports) and all({local, remote} & gloo for local, remote in connections)


def test_no_process_has_a_tcpstore_before_and_after_the_death_of_rank_0(tmp_path: Path) -> None:
    faults = [{"kind": "kill", "rank": 0, "step": 5}]  # in the second epoch
    result: Result = run_job(tmp_path, lambda: train(tmp_path, GeminiStrategy(faults=faults)), WORLD)  # type: ignore[arg-type]
    assert result.exit_status == 0, result.output[-4000:]
    assert result.injected == 1 and len(result.pids()[0]) == 2
    assert len(result.pids()[1]) == len(result.pids()[2]) == 1, "rank 0 took nobody with it"
    for epoch in (0, 1):
        found = records(tmp_path, epoch)
        assert only_gloo(found), found
        assert not any(record["agent"] for record in found), "the agent has no TCP socket at all"


def test_the_test_sees_a_tcpstore(tmp_path: Path) -> None:
    run_plain(tmp_path, lambda: train(tmp_path, "ddp"), WORLD)
    assert not only_gloo(records(tmp_path, 0))
