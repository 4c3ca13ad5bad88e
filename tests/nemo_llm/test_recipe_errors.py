"""The recipe, started with wrong input: one line, before models, data and processes."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import pytest

from tests.support.plain import run_plain

SCRIPT = Path(__file__).resolve().parents[2] / "recipes" / "nemo_llm" / "train.py"


def said(folder: Path, *overrides: str) -> list[str]:
    """What the user's process says before it ends."""

    def main() -> None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        sys.argv = [str(SCRIPT), "hydra.run.dir=.", "+strategy=gemini_megatron", *overrides]
        sys.orig_argv[1:] = sys.argv
        runpy.run_path(sys.argv[0], run_name="__main__")

    result = run_plain(folder, main, 1, timeout_s=60)
    assert result.exit_status == 1 and "Traceback" not in result.output, result.output
    return [line for line in result.output.splitlines() if line.startswith(("nemo_llm: ", "lightning_gemini: "))]


ON_CPU = ["trainer.accelerator=cpu", "trainer.devices=4"]
WRONG = {
    "no GPU": ([], "nemo_llm: trainer.accelerator='gpu', but this machine has no GPU: run the recipe on one"),
    "sizes": (
        [*ON_CPU, "trainer.strategy.tensor_model_parallel_size=3"],
        "does not divide the world of 4 ranks: change a parallel size, or",
    ),
    "a key": ([*ON_CPU, "+trainer.strategy.tensor=1"], "nemo_llm: unknown key 'tensor'=1 for GeminiMegatronStrategy: known keys are"),
    "storage": ([*ON_CPU, "trainer.strategy.persistent.url=/x"], "nemo_llm: persistent.url='/x' is not supported"),
}


@pytest.mark.usefixtures("nemo")
@pytest.mark.parametrize("name", WRONG)
def test_one_line(tmp_path: Path, name: str) -> None:
    overrides, message = WRONG[name]
    (line,) = said(tmp_path, *overrides)
    assert message in line


def test_without_nemo(tmp_path: Path) -> None:
    from lightning_gemini.nemo.versions import require_nemo

    try:
        require_nemo()
    except ImportError as error:
        assert said(tmp_path, *ON_CPU) == [f"lightning_gemini: {error}"]
    else:
        pytest.skip("it is installed")
