"""SIGTERM to a NeMo job: all ranks end after the same step, a checkpoint is left, `resume_if_exists` goes on with the same bits."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.nemo.jobs import STEPS, compare, gemini, plain, same
from tests.support.jobs import Result

SCRIPT = Path(__file__).parent / "scripts" / "preempted.py"
IN_A_CKPT = ["+data=mmap", "~model.spec_augment"]
"""Mapped data has its place in the epoch in Lightning's checkpoints, and the rank's generators; nobody has those of NeMo's augmenters."""
KILL_RANK_0 = "trainer.strategy.faults=[{kind:kill,rank:0,step:1,where:backward}]"


def job(folder: Path, manifests: Path, *overrides: str) -> Result:
    return gemini(folder, manifests, "quartznet", "+strategy=gemini", *overrides, file=SCRIPT)


def preempted(folder: Path, manifests: Path, *overrides: str) -> Result:
    result = job(folder, manifests, *overrides)
    assert result.exit_status == 143 and "lightning_gemini: ended by signal" in result.output, result.output[-6000:]
    return result


def saved_by_nemo(result: Result) -> list[int]:
    """Steps of `*-last.ckpt`."""
    found = result.directory.glob("checkpoints/*-last.ckpt")
    return [torch.load(path, map_location="cpu", weights_only=False)["global_step"] for path in found]


def persistent(store: Path) -> str:
    return f"trainer.strategy.persistent={{url:{store},every_n_steps:1000}}"


def persisted(store: Path) -> list[int]:
    return [int(path.parent.name.split(".")[0].removeprefix("step-")) for path in store.glob("step-*/.metadata")]


def test_without_nemo_s_callback_as_on_cpu(tmp_path: Path, manifests: Path) -> None:
    """The job's last step is at `persistent.url`."""
    store = tmp_path / "store"
    line = ["+callback=false", persistent(store)]
    first = preempted(tmp_path / "job", manifests, *line)
    (step,) = persisted(store)
    assert 4 < step < STEPS and step not in saved_by_nemo(first)
    second = job(tmp_path / "job", manifests, *line)
    assert f"the job goes on from {store}/" in second.output, second.output[-4000:]
    same(second, plain(tmp_path / "plain", manifests, "quartznet"))


def test_nemo_s_callback_saves_the_last_step(tmp_path: Path, manifests: Path) -> None:
    line = ["+callback=true", *IN_A_CKPT]
    first = preempted(tmp_path / "job", manifests, *line)
    (step,) = saved_by_nemo(first)
    assert 4 < step < STEPS and step % 4, "not one of a validation"
    second = job(tmp_path / "job", manifests, *line)
    undisturbed = plain(tmp_path / "plain", manifests, "quartznet", *IN_A_CKPT)
    assert second.exit_status == undisturbed.exit_status == 0, second.output[-4000:]
    # What was logged lies a step earlier: NeMo saves before Lightning has counted the step for its loggers.
    a, b = compare.read(second.directory), compare.read(undisturbed.directory)
    assert (a.step, a.weights, a.optimizer) == (b.step, b.weights, b.optimizer)


def test_both_save_and_the_random_numbers_decide(tmp_path: Path, manifests: Path) -> None:
    """The callback is heard in a rank 0 that took over. Of two checkpoints of one step, ours counts."""
    store = tmp_path / "store"
    line = ["+callback=true", persistent(store), KILL_RANK_0]
    first = preempted(tmp_path / "job", manifests, *line)
    assert first.injected == 1 and saved_by_nemo(first) == persisted(store)
    second = job(tmp_path / "job", manifests, *line)
    assert f"the job goes on from {store}/" in second.output
    same(second, plain(tmp_path / "plain", manifests, "quartznet"), all_rows=False)
