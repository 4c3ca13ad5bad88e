"""The persistent tier of a job on several nodes: one checkpoint of all, and the next job goes on from it, on as many nodes or on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_gemini import GeminiFSDP2Strategy, GeminiStrategy
from tests.storage.test_jobs import checkpoints, script
from tests.support.cluster import JobOnNodes, on_nodes
from tests.support.etcd import Etcd
from tests.support.jobs import VOLATILE, Recorder, run_job
from tests.support.models import Net, loader

NODES, PER_NODE = 2, 2


def job(directory: Path, etcd: Etcd, *, fsdp: bool, epochs: int, **options: Any) -> JobOnNodes:
    """A job of two nodes, run to its end."""

    def train() -> None:
        pl.seed_everything(1)
        sizes: dict[str, Any] = {"data_parallel_size": NODES * PER_NODE, "tensor_parallel_size": 1} if fsdp else {}
        trainer = pl.Trainer(
            accelerator="cpu", devices=PER_NODE, num_nodes=NODES, max_epochs=epochs,
            strategy=(GeminiFSDP2Strategy if fsdp else GeminiStrategy)(**sizes, **options),
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, logger=False,
            gradient_clip_val=0.5, default_root_dir=str(directory), callbacks=[Recorder(str(directory))], limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(Net(width=64, fsdp=fsdp), loader())

    running = on_nodes(directory, [etcd.url], train, NODES, PER_NODE)
    try:
        assert set(running.wait().values()) == {0}, running.outputs()
    finally:
        running.stop()
    return running


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp2"])
def test_the_next_job_goes_on(tmp_path: Path, etcd: Etcd, fsdp: bool) -> None:
    world = NODES * PER_NODE
    expected = run_job(tmp_path / "one", script(tmp_path / "one", fsdp=fsdp, epochs=2, world=world), world)
    assert expected.exit_status == 0, expected.output
    store = tmp_path / "store"
    persistent = {"url": str(store), "every_n_steps": 4}
    first = job(tmp_path / "first", etcd, fsdp=fsdp, epochs=1, persistent=persistent)
    steps = checkpoints(store)
    assert steps, first.outputs()
    written = [event for event in first.named("persisted") if event["step"] == steps[-1]]
    assert len(written) == NODES, "each node writes its part"
    second = job(tmp_path / "second", etcd, fsdp=fsdp, epochs=2, persistent={**persistent, "every_n_steps": 1000})
    assert f"goes on from step {steps[-1]}" in second.outputs()
    for rank, found in expected.ranks.items():
        assert {k: v for k, v in found.items() if k not in VOLATILE} == {k: v for k, v in second.ranks[rank].items() if k not in VOLATILE}
    seldom = {**persistent, "every_n_steps": 1000}
    alone = run_job(tmp_path / "alone", script(tmp_path / "alone", fsdp=fsdp, epochs=2, persistent=seldom), 2)
    assert alone.exit_status == 0, alone.output
