"""The recipe of mapped data as its user runs it: a script, real processes, a rank that is killed, a checkpoint in mid-epoch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_gemini.telemetry.events import read_events

SCRIPT = Path(__file__).resolve().parents[2] / "recipes" / "data" / "train.py"
STEPS = 24
TEXT = "".join(f"line {number} of a text that is long enough for two epochs\n" for number in range(256))
"""14 steps an epoch, of two ranks."""


def run(base: Path, name: str, *overrides: str) -> dict[int, dict[str, Any]]:
    """What each rank recorded."""
    (base / "text.txt").write_text(TEXT)
    out = base / name
    line = [sys.executable, str(SCRIPT), f"hydra.run.dir={out}", f"data.train={base}/text.txt", f"data.cache_directory={base}/cache"]
    line += [f"trainer.max_steps={STEPS}", *overrides]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, env=env, cwd=base, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {rank: json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def whole(base: Path) -> dict[int, dict[str, Any]]:
    """Mapped, under Lightning's own DDP, undisturbed."""
    return run(base, "whole", "+data=mmap")


def test_each_batch_once_although_a_rank_is_killed(base: Path, whole: dict[int, dict[str, Any]]) -> None:
    assert run(base, "killed", "+data=mmap", "+strategy=gemini", "+faults=kill_rank") == whole
    events = read_events(str(base / "killed" / "gemini" / "agent.jsonl"))
    assert [event["reason"].split(" died: ")[1] for event in events if event["event"] == "recovered"] == ["signal SIGKILL"]
    assert sum(event["event"] == "loader_started" for event in events) == 4, "one per rank and epoch: the killed rank's own was kept"
    assert all(len(set(record["batches"].values())) == STEPS for record in whole.values())
    assert whole[0]["batches"].keys() == whole[1]["batches"].keys() and whole[0]["params"] == whole[1]["params"]


def test_a_checkpoint_in_mid_epoch_goes_on_with_the_next_batch(base: Path, whole: dict[int, dict[str, Any]]) -> None:
    resumed = run(base, "resumed", "+data=mmap", f"ckpt_path={base}/whole/checkpoints/step10.ckpt")
    for rank in range(2):
        for kind in ("batches", "losses"):
            first, second = (list(records[rank][kind].items()) for records in (whole, resumed))
            assert second[10:] == first[10:] and len(second) == STEPS
        assert resumed[rank]["params"] == whole[rank]["params"]
