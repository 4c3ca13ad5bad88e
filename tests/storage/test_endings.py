"""A job that is asked to end leaves a checkpoint of the step after which it ends, and the next one goes on from there."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_gemini import GeminiFSDP2Strategy, GeminiStrategy
from tests.storage.test_jobs import WORLD, checkpoints
from tests.support.jobs import Recorder, Result, run_job, same
from tests.support.models import Net, loader

RARELY = 1000


class Asks(pl.Callback):
    """Sends SIGTERM to the agent, before which ranks have had one, as from Slurm; all have some steps to go."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        if trainer.global_step == 3 and trainer.is_global_zero:
            os.kill(os.getppid(), signal.SIGTERM)


class Leaves(pl.Callback):
    """As NeMo's PreemptionCallback: told by the signal, it ends this rank itself at the end of a batch."""

    def __init__(self) -> None:
        self.asked = False

    def on_train_start(self, *_: Any) -> None:
        signal.signal(signal.SIGTERM, self.ask)

    def ask(self, *_: Any) -> None:
        self.asked = True

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.asked:
            (Path(trainer.default_root_dir) / f"left{trainer.global_rank}").write_text(str(trainer.global_step))
            raise SystemExit(0)


def script(directory: Path, fsdp: bool, *callbacks: type[pl.Callback], **options: Any) -> Callable[[], None]:
    def train() -> None:
        logging.basicConfig(force=True)  # else pytest's own handler has it
        pl.seed_everything(1)
        sizes: dict[str, Any] = {"data_parallel_size": WORLD, "tensor_parallel_size": 1} if fsdp else {}
        trainer = pl.Trainer(
            accelerator="cpu", devices=WORLD, strategy=(GeminiFSDP2Strategy if fsdp else GeminiStrategy)(**sizes, **options),
            max_steps=16, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, logger=False,
            default_root_dir=str(directory), callbacks=[*(make() for make in callbacks), Recorder(str(directory))], limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(Net(width=64, fsdp=fsdp), loader())

    return train


def job(directory: Path, fsdp: bool, *callbacks: type[pl.Callback], **options: Any) -> Result:
    return run_job(directory, script(directory, fsdp, *callbacks, **options), WORLD)


CASES = {
    "ddp": (False, [Asks], 1),
    "fsdp2": (True, [Asks], 1),
    "without snapshots": (False, [Asks], 0),
    "a callback ends the ranks": (False, [Asks, Leaves], 1),
}


@pytest.mark.parametrize("case", CASES)
def test_the_step_after_which_a_job_is_ended_is_persisted(tmp_path: Path, case: str) -> None:
    fsdp, callbacks, every = CASES[case]
    options = {"persistent": {"url": str(tmp_path / "store"), "every_n_steps": RARELY}, "snapshot": {"every_n_steps": every}}
    first = job(tmp_path / "first", fsdp, *callbacks, **options)
    assert first.exit_status == 143 and "ended by signal" in first.output, first.output
    (step,) = checkpoints(tmp_path / "store")
    assert f"the newest checkpoint is {tmp_path}/store/step-{step}." in first.output
    assert 4 <= step < 12, "it went on for long"
    left = {path.read_text() for path in (tmp_path / "first").glob("left*")}
    assert left == ({str(step)} if Leaves in callbacks else set()), "handlers are called after the step that is persisted, in all ranks"
    second = job(tmp_path / "second", fsdp, *callbacks, **options)  # step 3 is behind it
    assert f"goes on from step {step} " in second.output
    same(job(tmp_path / "undisturbed", fsdp), second)


def test_the_next_job_has_other_callbacks(tmp_path: Path) -> None:
    """Each gets its own state, whatever its place in the list; a new one begins, one that is missed is named."""
    options = {"persistent": {"url": str(tmp_path / "store"), "every_n_steps": RARELY}}
    assert job(tmp_path / "first", False, Asks, **options).exit_status == 143
    second = job(tmp_path / "second", False, Leaves, Leaves, **options)
    assert "callbacks have changed since the checkpoint was written" in second.output
    assert "state of ['tests.storage.test_endings.Asks'] is not used" in second.output
    same(job(tmp_path / "undisturbed", False), second)


class Fails(pl.Callback):
    """Once, in rank 1, between two steps: it enters `fit` again in its process."""

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        marker = Path(trainer.default_root_dir) / "failed"
        if trainer.global_step == 1 and trainer.global_rank == 1 and not marker.exists():
            marker.touch()
            raise RuntimeError("injected")


def test_a_rank_that_has_entered_fit_again_calls_the_scripts_handler_too(tmp_path: Path) -> None:
    train = script(tmp_path, False, Fails, Asks)

    def handled() -> None:
        signal.signal(signal.SIGTERM, lambda *_: (tmp_path / f"handled-{os.getpid()}").touch())
        train()

    result = run_job(tmp_path, handled, WORLD)
    assert result.exit_status == 143 and len(result.recoveries) == 1 and (tmp_path / "failed").exists(), result.output
    assert len(list(tmp_path.glob("handled-*"))) == WORLD
