"""Whole jobs with a persistent tier: nothing changes by it, and the next job goes on from where the last one ended."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_gemini import GeminiFSDP2Strategy, GeminiStrategy
from tests.support.jobs import Recorder, Result, run_job, same
from tests.support.models import Net, loader

WORLD = 2


def script(
    directory: Path, *, fsdp: bool, epochs: int, world: int = WORLD, sharded_model: bool | None = None, go_on: str | None = None,
    save: str = "", **options: Any,
) -> Callable[[], None]:  # fmt: skip
    """A training of 12 steps an epoch. `sharded_model`: the model that FSDP2 can train, also under DDP. `go_on`: the user's own checkpoint;
    `save`: where to make one in the end."""

    def train() -> None:
        pl.seed_everything(1)
        sizes: dict[str, Any] = {"data_parallel_size": world, "tensor_parallel_size": 1} if fsdp else {}
        trainer = pl.Trainer(
            accelerator="cpu", devices=world, strategy=(GeminiFSDP2Strategy if fsdp else GeminiStrategy)(**sizes, **options),
            max_epochs=epochs, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, logger=False,
            gradient_clip_val=0.5, default_root_dir=str(directory), callbacks=[Recorder(str(directory))], limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(Net(width=64, fsdp=fsdp if sharded_model is None else sharded_model), loader(), ckpt_path=go_on)
        if save:
            trainer.save_checkpoint(save)

    return train


def job(directory: Path, world: int = WORLD, **options: Any) -> Result:
    return run_job(directory, script(directory, world=world, **options), world)


def checkpoints(store: Path) -> list[int]:
    """Steps of the complete ones."""
    return sorted(int(path.parent.name.split(".")[0].removeprefix("step-")) for path in store.glob("step-*/.metadata"))


def named(result: Result, event: str) -> list[dict[str, Any]]:
    return [found for found in result.agent_events if found["event"] == event]


@pytest.fixture(scope="module", params=[False, True], ids=["ddp", "fsdp2"])
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[bool, Result]:
    return request.param, job(tmp_path_factory.mktemp("undisturbed"), fsdp=request.param, epochs=2)


def test_a_job_is_persisted_and_the_next_one_goes_on(tmp_path: Path, undisturbed: tuple[bool, Result]) -> None:
    fsdp, expected = undisturbed
    store = tmp_path / "store"
    persistent = {"url": str(store), "every_n_steps": 5, "keep_last": 2}
    first = job(tmp_path / "first", fsdp=fsdp, epochs=1, persistent=persistent)
    assert first.exit_status == 0, first.output
    steps = checkpoints(store)
    assert steps and set(steps) <= {5, 10, 15} and not named(first, "persist_failed"), first.agent_events
    second = job(tmp_path / "second", fsdp=fsdp, epochs=2, persistent=persistent)
    same(expected, second)
    assert f"goes on from step {steps[-1]}" in second.output
    assert len(checkpoints(store)) <= 2


@pytest.mark.parametrize(("epochs", "every", "theirs"), [(1, 9, True), (2, 20, False)])
def test_the_newer_of_storage_and_the_user_s_checkpoint_counts(tmp_path: Path, epochs: int, every: int, theirs: bool) -> None:
    """The user's is of step 12; storage has one of step 9, or of 20. (NeMo's exp_manager gives one too.)"""
    expected = job(tmp_path / "undisturbed", fsdp=False, epochs=3)
    given, persistent = str(tmp_path / "own.ckpt"), {"url": str(tmp_path / "store"), "every_n_steps": every, "keep_last": 1}
    assert job(tmp_path / "own", fsdp=False, epochs=1, save=given).exit_status == 0
    assert job(tmp_path / "stored", fsdp=False, epochs=epochs, persistent=persistent).exit_status == 0
    result = job(tmp_path / "next", fsdp=False, epochs=3, go_on=given, persistent=persistent)
    assert result.exit_status == 0, result.output
    ours = f"{tmp_path}/store/"
    told = next(line for line in result.output.splitlines() if "the job goes on from" in line and "not from" in line)
    assert told.index(given) < told.index(ours) if theirs else told.index(ours) < told.index(given)
    if not theirs:  # of their own, Lightning knows the steps, but not the random numbers
        same(expected, result)


@pytest.mark.parametrize("kind", ["kill", "raise"])
def test_the_checkpoint_that_a_job_began_from_is_not_needed_again(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a rolling one. Rank 1's replacement starts when it is gone, or rank 1 goes through `fit` a second time."""
    given = tmp_path / "own.ckpt"
    assert job(tmp_path / "own", fsdp=False, epochs=1, save=str(given)).exit_status == 0
    expected = job(tmp_path / "undisturbed", fsdp=False, epochs=2, go_on=str(given))
    monkeypatch.setattr(Net, "on_train_start", lambda self: given.unlink(missing_ok=True))
    fault = {"kind": kind, "rank": 1, "step": 15, "where": "after_step"}
    result = job(tmp_path / "faulted", fsdp=False, epochs=2, go_on=str(given), faults=[fault], recovery={"spares": 0})
    same(expected, result)
    assert result.injected == 1 and not given.exists()


def test_a_job_of_another_size_goes_on(tmp_path: Path, undisturbed: tuple[bool, Result]) -> None:
    fsdp, _ = undisturbed
    store = tmp_path / "store"
    persistent = {"url": str(store), "every_n_steps": 5}
    assert job(tmp_path / "first", fsdp=fsdp, epochs=1, persistent=persistent).exit_status == 0
    last = checkpoints(store)[-1]
    larger = job(tmp_path / "larger", world=3, fsdp=fsdp, epochs=3, persistent={**persistent, "every_n_steps": 1000})
    assert larger.exit_status == 0, larger.output
    assert larger.ranks[0]["steps"] > last and len({rank["params"] for rank in larger.ranks.values()}) == (3 if fsdp else 1)


@pytest.mark.parametrize("fsdp", [False, True], ids=["of ddp under fsdp2", "of fsdp2 under ddp"])
def test_a_checkpoint_of_another_strategy_is_loaded(tmp_path: Path, fsdp: bool) -> None:
    """The arenas of the two are laid out differently, although the ranks are as many."""
    store = tmp_path / "store"
    persistent = {"url": str(store), "every_n_steps": 5}
    assert job(tmp_path / "first", fsdp=fsdp, epochs=1, sharded_model=True, persistent=persistent).exit_status == 0
    last, seldom = checkpoints(store)[-1], {**persistent, "every_n_steps": 1000}
    other = job(tmp_path / "other", fsdp=not fsdp, epochs=2, sharded_model=True, persistent=seldom)
    assert other.exit_status == 0, other.output
    assert other.ranks[0]["steps"] > last and checkpoints(store)[-1] == last


def test_resume_never_begins_anew(tmp_path: Path) -> None:
    expected = job(tmp_path / "undisturbed", fsdp=False, epochs=1)
    store = tmp_path / "store"
    assert job(tmp_path / "first", fsdp=False, epochs=1, persistent={"url": str(store), "every_n_steps": 5}).exit_status == 0
    again = job(tmp_path / "again", fsdp=False, epochs=1, persistent={"url": str(store), "every_n_steps": 5, "resume": "never"})
    assert again.exit_status == 1 and "persistent.resume='never'" in again.output
    shutil.rmtree(store)
    same(expected, job(tmp_path / "third", fsdp=False, epochs=1, persistent={"url": str(store), "resume": "never"}))


def test_a_url_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = job(tmp_path / "job", fsdp=False, epochs=1, persistent={"url": str(tmp_path / "file" / "store")})
    assert result.exit_status == 1 and "persistent.url=" in result.output and not result.ranks
