"""The NeMo script of the recipe in forked ranks, under an agent or under Lightning's own DDP."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

from tests.nemo.conftest import RECIPE
from tests.support.jobs import Result, run_job
from tests.support.plain import run_plain

sys.path.insert(0, str(RECIPE))

import compare

WORLD, STEPS = 2, 10
SMALL = [
    f"trainer.max_steps={STEPS}", "trainer.val_check_interval=4", "+trainer.limit_val_batches=1", "data.batch_size=4",
    "exp_manager.resume_if_exists=true", "exp_manager.resume_ignore_no_checkpoint=true",
]  # fmt: skip
MODELS = ["quartznet", "conformer_ctc"]
BOTH = "trainer.strategy.faults=[{kind:kill,rank:1,step:5,where:backward},{kind:raise,rank:0,step:8,where:validation}]"
RANK_0 = "trainer.strategy.faults=[{kind:kill,rank:0,step:4,where:callback},{kind:kill,rank:0,step:7,where:forward}]"
"""The first while exp_manager's checkpoint is due."""


def script(manifests: Path, model: str, *overrides: str, file: Path = RECIPE / "speech_to_text_ctc.py") -> Callable[[], None]:
    """The user's command line, for a process whose folder is the run's."""

    def main() -> None:
        data = [f"data.manifest={manifests}/train.json", f"data.validation={manifests}/validation.json"]
        sys.argv = [str(file), "--config-name", model, "exp_manager.exp_dir=exp", *data, *SMALL, *overrides]
        sys.orig_argv[1:] = sys.argv
        runpy.run_path(sys.argv[0], run_name="__main__")

    return main


def gemini(directory: Path, manifests: Path, model: str, *overrides: str, **other: Path) -> Result:
    """With an agent; events lie in the run's `exp/<model>/gemini`."""
    result = run_job(directory, script(manifests, model, *overrides, **other), WORLD)
    result.directory = directory / "exp" / model
    return result


def plain(directory: Path, manifests: Path, model: str, *overrides: str) -> Result:
    """Under Lightning's own DDP."""
    result = run_plain(directory, script(manifests, model, *overrides), WORLD)
    result.directory = directory / "exp" / model
    return result


def same(disturbed: Result, undisturbed: Result, *, all_rows: bool = True) -> None:
    """Both have ended well, with the same bits. Without `all_rows` some may be missing: TensorBoard keeps them in memory of rank 0."""
    for result in (disturbed, undisturbed):
        assert result.exit_status == 0, result.output[-6000:]
    a, b = compare.read(disturbed.directory), compare.read(undisturbed.directory)
    found = compare.verdict(a, b)
    keys = a.logged.keys() | b.logged.keys()
    different = [(key, a.logged.get(key), b.logged.get(key)) for key in keys if a.logged.get(key) != b.logged.get(key)]
    if not all_rows:
        assert a.logged.items() <= b.logged.items(), different
        assert {name for name, equal in found.items() if not equal} <= {name for name in found if "logged" in name}, found
    else:
        assert all(found.values()), (found, different)
