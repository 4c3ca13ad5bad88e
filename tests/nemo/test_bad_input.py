"""Wrong input: one error that says what to do, and no process is started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.nemo.conftest import RECIPE
from tests.nemo.jobs import script
from tests.support.jobs import Result
from tests.support.plain import run_plain


def run(folder: Path, manifests: Path, *overrides: str) -> Result:
    """The user's process, as far as it comes."""
    return run_plain(folder, script(manifests, "quartznet", *overrides), 1)


def refused(status: int, output: str, *words: str) -> None:
    assert status == 1 and "warm spare" not in output and "Traceback (most recent call last)" not in output, output[-3000:]
    for word in words:
        assert output.count(word) == 1, output[-3000:]


WRONG = {
    "gpus": (["+recovery=gemini", "trainer.accelerator=gpu", "trainer.devices=99"],
             ["nemo_asr: trainer.accelerator=gpu with trainer.devices=99, but this machine has", "trainer.accelerator=cpu"]),
    "a key of the strategy": (["+recovery=gemini", "+trainer.strategy.nonsense=1"],
                              ["unknown key 'nonsense'=1 for GeminiStrategy: known keys"]),
    "a value of the strategy": (["+recovery=gemini", "trainer.strategy.recovery.spares=-1"], ["recovery.spares=-1 is not valid"]),
    "a strategy of NeMo 2": (["+strategy=gemini_megatron"], ["has no MegatronStrategy", "NeMo 3 (speech) takes strategy='gemini'"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_options(tmp_path: Path, manifests: Path, name: str) -> None:
    overrides, words = WRONG[name]
    result = run(tmp_path, manifests, *overrides)
    refused(result.exit_status, result.output, *words)
    assert not (tmp_path / "exp").exists()


def test_a_manifest_with_missing_recordings(tmp_path: Path, manifests: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({"audio_filepath": "gone.wav", "duration": 1.0, "text": "one"}) + "\n")
    result = run(tmp_path, manifests, "+recovery=gemini", f"data.manifest={broken}")
    refused(result.exit_status, result.output, "nemo_asr: model.train_ds.manifest_filepath=", "1 of 1 recordings are missing", "gone.wav")
    assert not (tmp_path / "exp").exists()


@pytest.mark.parametrize(
    ("packages", "words"),
    [
        ({"lightning": "2.5.6"}, ["NeMo (nemo_toolkit) is not installed", "make venv-nemo"]),
        ({"lightning": "2.4.0", "nemo_toolkit": "2.5.3"}, ["nemo_toolkit 2.5.3 is installed", "for 3.x", "recipes/nemo_llm"]),
        ({"lightning": "2.6.6", "nemo_toolkit": "3.0.0"}, ["lightning 2.6.6 does not work with nemo_toolkit 3.0.0", "<2.6"]),
    ],
)
def test_nemo_absent_or_a_wrong_lightning(tmp_path: Path, packages: dict[str, str], words: list[str]) -> None:
    """An interpreter that sees only these packages."""
    for name, version in packages.items():
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    line = [sys.executable, "-S", str(RECIPE / "speech_to_text_ctc.py"), "+recovery=gemini"]
    result = subprocess.run(line, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    refused(result.returncode, result.stdout + result.stderr, "nemo_asr:", *words)
