"""Both could go on from a checkpoint: exp_manager from its `last.ckpt`, we from persistent storage. The newer one counts."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.nemo.jobs import compare, gemini


def persistent(store: Path, every: int) -> str:
    return f"trainer.strategy.persistent={{url:{store},every_n_steps:{every},keep_last:1}}"


def told(output: str) -> str:
    return next(line for line in output.splitlines() if "the job goes on from" in line and "not from" in line)


def test_last_ckpt_counts_where_it_is_newer(tmp_path: Path, manifests: Path) -> None:
    store, job = tmp_path / "store", tmp_path / "job"
    first = gemini(job, manifests, "quartznet", "+strategy=gemini", "trainer.max_steps=6")
    other = gemini(tmp_path / "other", manifests, "quartznet", "+strategy=gemini", "trainer.max_steps=3", persistent(store, 3))
    assert first.exit_status == other.exit_status == 0, first.output + other.output
    result = gemini(job, manifests, "quartznet", "+strategy=gemini", persistent(store, 100))
    assert result.exit_status == 0, result.output[-4000:]
    line = told(result.output)
    assert line.index("-last.ckpt") < line.index(f"{store}/")
    assert compare.read(result.directory).step == 10


def test_storage_counts_where_it_is_newer(tmp_path: Path, manifests: Path) -> None:
    """The job has died after it was persisted, and before `exp_manager` saved again: its folder is that of step 6."""
    store, job = tmp_path / "store", tmp_path / "job"
    first = gemini(job, manifests, "quartznet", "+strategy=gemini", "trainer.max_steps=6")
    checkpoints = first.directory / "checkpoints"
    shutil.copytree(checkpoints, tmp_path / "of step 6")
    second = gemini(job, manifests, "quartznet", "+strategy=gemini", "trainer.max_steps=9", persistent(store, 9))
    assert first.exit_status == second.exit_status == 0, first.output + second.output
    shutil.rmtree(checkpoints)
    shutil.copytree(tmp_path / "of step 6", checkpoints)
    result = gemini(job, manifests, "quartznet", "+strategy=gemini", "trainer.max_steps=12", persistent(store, 100))
    assert result.exit_status == 0, result.output[-4000:]
    line = told(result.output)
    assert line.index(f"{store}/") < line.index("-last.ckpt")
    assert compare.read(result.directory).step == 12, "exp_manager goes on saving where it did"
