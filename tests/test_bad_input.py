"""Each wrong input gets one clear error that names the key, the value and the remedy, before the first step."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_gemini import GeminiCallback, GeminiFSDP2Strategy, GeminiStrategy
from tests.support.jobs import Result, run_job
from tests.support.models import Net, loader


def fit(
    directory: Path, model: Callable[[], pl.LightningModule] = Net, strategy: Callable[[], Any] = GeminiStrategy, **trainer: Any
) -> None:
    options = {
        "accelerator": "cpu",
        "devices": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "max_steps": 2,
    }
    pl.Trainer(**{**options, "strategy": strategy(), "default_root_dir": str(directory), **trainer}).fit(model(), loader())


def refused(directory: Path, *words: str, **options: Any) -> Result:
    result = run_job(directory, lambda: fit(directory, **options), 2, timeout_s=60)
    assert result.exit_status == 1, result.output
    for word in words:
        assert word in result.output, result.output
    assert result.output.count("failed in set-up") == 1, "one error, not one per rank"
    return result


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"snapshot": {"evry_n_steps": 2}}, ["snapshot.evry_n_steps", "every_n_steps"]),
        ({"snapshot": {"every_n_steps": -1}}, ["snapshot.every_n_steps=-1", "0 for none"]),
        ({"recovery": {"spares": "two"}}, ["recovery.spares='two'"]),
        ({"snapshott": {}}, ["snapshott", "known keys"]),
        ({"static_graph": True}, ["static_graph=True", "leave it out"]),
        ({"start_method": "fork"}, ["start_method='fork'", "leave it out"]),
    ],
)
def test_a_typo_in_the_configuration(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        GeminiStrategy(**options)
    assert all(word in str(error.value) for word in words)


def test_one_device() -> None:
    with pytest.raises(ValueError, match=r"devices=1 .*devices=2"):
        pl.Trainer(accelerator="cpu", devices=1, strategy=GeminiStrategy())


def test_several_nodes_without_an_etcd(tmp_path: Path) -> None:
    trainer = pl.Trainer(accelerator="cpu", devices=2, num_nodes=2, strategy=GeminiStrategy(), logger=False, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match=r"num_nodes=2 needs an etcd .*membership.etcd="):
        trainer.fit(Net(), loader())


def test_more_copies_than_nodes() -> None:
    with pytest.raises(ValueError, match=r"replication.copies=3 .*2"):
        pl.Trainer(accelerator="cpu", devices=2, num_nodes=2, strategy=GeminiStrategy(replication={"copies": 3}))


def test_the_callback_without_the_strategy(tmp_path: Path) -> None:
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, callbacks=[GeminiCallback()], default_root_dir=tmp_path)
    with pytest.raises(ValueError, match="strategy='gemini'"):
        trainer.fit(Net(), loader())


def _fit_in_child(directory: str, queue: Any) -> None:
    try:
        fit(Path(directory))
    except ValueError as error:
        queue.put(str(error))


def test_a_script_that_forks(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_fit_in_child, args=(str(tmp_path), queue))
    child.start()
    child.join(30)
    assert "main process" in queue.get()
    queue.close()
    child.close()


def test_a_program_without_a_file() -> None:
    code = "import lightning.pytorch as pl, lightning_gemini; from tests.support.models import Net, loader; "
    code += "pl.Trainer(accelerator='cpu', devices=2, strategy='gemini', logger=False).fit(Net(), loader())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 1 and "python file.py" in done.stderr


def test_not_enough_memory(tmp_path: Path) -> None:
    def small() -> Any:
        from lightning_gemini.recovery import room

        room.available_memory = lambda: 1 << 20  # type: ignore[assignment]
        return GeminiStrategy()

    refused(tmp_path, "two snapshot slots", "MiB of memory are available", strategy=small)


class Different(Net):
    def __init__(self) -> None:
        super().__init__(width=512 if os.environ["LIGHTNING_GEMINI_RANK"] != "1" else 256)


def test_ranks_with_different_parameters_fsdp2(tmp_path: Path) -> None:
    class Extra(Net):
        def __init__(self) -> None:
            super().__init__(fsdp=True)
            if os.environ["LIGHTNING_GEMINI_RANK"] == "1":
                self.extra = torch.nn.Parameter(torch.zeros(1))

    refused(tmp_path, "does not hold the same parameters as rank 0", model=Extra,
            strategy=lambda: GeminiFSDP2Strategy(data_parallel_size=2, tensor_parallel_size=1))  # fmt: skip


def test_ranks_with_different_parameters_ddp(tmp_path: Path) -> None:
    refused(tmp_path, "does not hold the same parameters as rank 0", "build the model alike", model=Different)


class NoState(torch.optim.SGD):
    def state_dict(self) -> Any:  # type: ignore[override]
        raise NotImplementedError("no state")


class WithOptimizer(Net):
    kind: Any = NoState

    def configure_optimizers(self) -> Any:
        return self.kind(self.parameters(), lr=0.1)


class WithLBFGS(WithOptimizer):
    kind = torch.optim.LBFGS


def test_an_optimizer_that_cannot_be_restored(tmp_path: Path) -> None:
    refused(tmp_path, "optimizer NoState", "cannot be restored", model=WithOptimizer)


def test_an_optimizer_that_cannot_be_repeated(tmp_path: Path) -> None:
    refused(tmp_path, "LBFGS", "use another optimizer", model=WithLBFGS)


def test_accumulation_under_fsdp2(tmp_path: Path) -> None:
    refused(tmp_path, "accumulate_grad_batches=2", model=lambda: Net(fsdp=True), accumulate_grad_batches=2,
            strategy=lambda: GeminiFSDP2Strategy(data_parallel_size=2, tensor_parallel_size=1))  # fmt: skip


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(tmp_path, "telemetry.directory", str(tmp_path / "file"), "give a directory",
            strategy=lambda: GeminiStrategy(telemetry={"directory": str(tmp_path / "file" / "x")}))  # fmt: skip


def test_devices_that_differ_from_the_agents(tmp_path: Path) -> None:
    refused(tmp_path, "devices=3", "--nproc-per-node=2", devices=3)
