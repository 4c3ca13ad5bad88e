"""The three ways a user starts a job, as real commands: each recovers from a kill, and all give the same bits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "support" / "scripts"


def started(directory: Path, way: str) -> list[str]:
    python, script = sys.executable, str(SCRIPTS / "train.py")
    return {
        "python": [python, script, str(directory)],
        "run": [str(Path(python).parent / "lightning-gemini"), "run", "--nproc-per-node", "2", script, str(directory)],
        "hydra": [
            python,
            str(SCRIPTS / "train_hydra.py"),
            "+strategy=gemini",
            f"directory={directory}",
            f"hydra.run.dir={directory}/hydra",
        ],
    }[way]


def ran(directory: Path, way: str, *, die: bool) -> list[dict[str, object]]:
    directory.mkdir()
    if not die:
        (directory / "died").touch()
    done = subprocess.run(started(directory, way), capture_output=True, text=True, timeout=100, check=False, cwd=directory)
    assert done.returncode == 0, done.stderr[-4000:]
    assert ("recovered in" in done.stderr) == die
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    return ran(tmp_path_factory.mktemp("entry") / "undisturbed", "python", die=False)


@pytest.mark.parametrize("way", ["python", "run", "hydra"])
def test_a_killed_rank(tmp_path: Path, undisturbed: list[dict[str, object]], way: str) -> None:
    result = ran(tmp_path / "job", way, die=True)
    for expected, record in zip(undisturbed, result, strict=True):
        assert {key: record[key] for key in ("losses", "params", "buffers", "optimizer", "rng", "steps")} == {
            key: expected[key] for key in ("losses", "params", "buffers", "optimizer", "rng", "steps")
        }


def test_the_exit_status_is_the_jobs(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text("raise SystemExit(7)\n")
    done = subprocess.run(
        [sys.executable, "-m", "lightning_gemini.agent", "--nproc-per-node", "2", str(script)], capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 7
