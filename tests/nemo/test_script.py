"""The script as its user runs it: real processes, the strategy by its name, exp_manager's own resume, wrong input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.nemo.conftest import RECIPE
from tests.nemo.jobs import compare

TIMEOUT_S = 240
FAULTS = "trainer.strategy.faults=[{kind:kill,rank:1,step:5,where:backward},{kind:raise,rank:0,step:6,where:before_step}]"
"""The second makes rank 0 enter `fit` again, in a process in which NeMo's telemetry is on."""


def run(folder: Path, manifests: Path, *overrides: str, script: str = "speech_to_text_ctc.py") -> subprocess.CompletedProcess[str]:
    data = [f"data.manifest={manifests}/train.json", f"data.validation={manifests}/validation.json"]
    small = ["exp_manager.exp_dir=exp", "+trainer.limit_val_batches=1", "data.batch_size=4"]
    line = [sys.executable, str(RECIPE / script), *data, *small, *overrides]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


@pytest.mark.timeout(2 * TIMEOUT_S + 20)
def test_the_strategy_s_name_is_enough_and_exp_manager_resumes(tmp_path: Path, manifests: Path) -> None:
    resume = ["exp_manager.resume_if_exists=true", "exp_manager.resume_ignore_no_checkpoint=true", "trainer.val_check_interval=2"]
    first = run(tmp_path, manifests, "trainer.strategy=gemini", "trainer.max_steps=4", *resume)
    assert first.returncode == 0, first.stderr[-4000:]
    folder = tmp_path / "exp" / "quartznet"
    assert compare.read(folder).step == 4 and "warm spare" in first.stdout + first.stderr
    assert (folder / "cmd-args.log").is_file() and not list(folder.glob("run_*")), "it took its own log files for those of an earlier run"
    second = run(tmp_path, manifests, "+strategy=gemini", FAULTS, "trainer.max_steps=8", *resume)
    assert second.returncode == 0, second.stderr[-4000:]
    assert compare.read(folder).step == 8
    assert [path.name for path in folder.glob("run_*")] == ["run_0"], "an earlier run's log files are moved once"
    events = [json.loads(line)["event"] for line in (folder / "gemini" / "agent.jsonl").read_text().splitlines()]
    assert events.count("recovered") == 2


def refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    output = result.stdout + result.stderr
    assert result.returncode == 1 and "warm spare" not in output and "Traceback (most recent call last)" not in output, output[-3000:]
    for word in words:
        assert word in output, output[-3000:]


def test_a_manifest_with_missing_recordings(tmp_path: Path, manifests: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({"audio_filepath": "gone.wav", "duration": 1.0, "text": "one"}) + "\n")
    result = run(tmp_path, manifests, "+recovery=gemini", f"data.manifest={broken}")
    refused(result, "nemo_asr: model.train_ds.manifest_filepath=", "1 of 1 recordings are missing", "gone.wav", "audio_filepath")
    assert not (tmp_path / "exp").exists()


def test_a_recipe_for_gpus_without_one(tmp_path: Path, manifests: Path) -> None:
    result = run(tmp_path, manifests, "+recovery=gemini", "trainer.accelerator=gpu")
    refused(result, "nemo_asr: trainer.accelerator=gpu with trainer.devices=2, but this machine has 0 GPUs", "trainer.accelerator=cpu")
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
    refused(result, "nemo_asr:", *words)
