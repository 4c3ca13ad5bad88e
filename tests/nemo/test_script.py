"""The script as its user runs it: real processes, the strategy by its name, exp_manager's own resume."""

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


def run(folder: Path, manifests: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    data = [f"data.manifest={manifests}/train.json", f"data.validation={manifests}/validation.json"]
    small = ["exp_manager.exp_dir=exp", "+trainer.limit_val_batches=1", "data.batch_size=4"]
    line = [sys.executable, str(RECIPE / "speech_to_text_ctc.py"), *data, *small, *overrides]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
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
