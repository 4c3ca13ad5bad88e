"""NeMo's speech models: ranks that are killed or raise, SpecAugment, dither and shuffling on, validation with WER in the middle."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.nemo.jobs import BOTH, MODELS, RANK_0, STEPS, compare, gemini, plain, same
from tests.support.jobs import Result

Runs = tuple[str, dict[str, Result]]


@pytest.fixture(scope="module", params=MODELS)
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, manifests: Path) -> Runs:
    """Lightning's own DDP, with mapped data and without (a loader process leaves the rank's own random numbers alone)."""
    base = tmp_path_factory.mktemp("undisturbed")
    return request.param, {
        "plain": plain(base / "plain", manifests, request.param),
        "mapped": plain(base / "mapped", manifests, request.param, "+data=mmap"),
    }


def test_bit_identical_after_a_kill_and_an_exception(tmp_path: Path, manifests: Path, undisturbed: Runs) -> None:
    model, runs = undisturbed
    disturbed = gemini(tmp_path, manifests, model, "+strategy=gemini", BOTH)
    same(disturbed, runs["plain"])
    assert disturbed.injected == 2 and len(disturbed.recoveries) == 2
    assert "val_wer" in compare.read(disturbed.directory).tags()


def test_bit_identical_after_two_kills_of_rank_0(tmp_path: Path, manifests: Path, undisturbed: Runs) -> None:
    model, runs = undisturbed
    disturbed = gemini(tmp_path, manifests, model, "+strategy=gemini", RANK_0, "trainer.strategy.recovery.spares=2")
    same(disturbed, runs["plain"], all_rows=False)
    assert disturbed.injected == 2 and len(disturbed.recoveries) == 2
    assert not list(disturbed.directory.glob("run_*")), "a spare moved log files away"
    assert not list(disturbed.directory.rglob("*-unfinished")), "a checkpoint is unfinished"


@pytest.mark.parametrize("step", ["rendezvous", "data", "in_process", "gemini"])
def test_each_step_of_adoption_is_one_option(tmp_path: Path, manifests: Path, undisturbed: Runs, step: str) -> None:
    model, runs = undisturbed
    if model != "quartznet":
        pytest.skip("one model is enough")
    if step in ("rendezvous", "data"):
        same(plain(tmp_path, manifests, model, f"+recovery={step}"), runs["plain" if step == "rendezvous" else "mapped"])
        return
    disturbed = gemini(tmp_path, manifests, model, f"+recovery={step}", BOTH)
    same(disturbed, runs["mapped"])
    assert disturbed.injected == 2 and len(disturbed.recoveries) == 2
    assert ("no snapshots in memory" in disturbed.output) == (step == "in_process")
    assert compare.read(disturbed.directory).step == STEPS
