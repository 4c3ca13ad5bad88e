"""The recipe of several nodes as its user runs it: etcd, three agents, a node that is killed, the losses of an undisturbed run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_gemini.telemetry.events import read_events
from tests.support.etcd import require_etcd
from tests.support.meeting import free_port

NODES = Path(__file__).resolve().parents[2] / "recipes" / "nodes"
STEPS = 60
OVERRIDES = [f"trainer.max_steps={STEPS}", "step_s=0.05", "trainer.strategy.recovery.spares=0"]


def run(base: Path, *line: str) -> str:
    """What a command says on its standard output."""
    port = free_port(2)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "ETCD_PORT": str(port), "ETCD_PEER_PORT": str(port + 1)}
    done = subprocess.run([*line, *OVERRIDES], cwd=base, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def losses(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "losses.json").read_text())
    assert len(found["losses"]) == STEPS
    return found


@pytest.mark.timeout(240)  # eight processes that import torch
def test_a_node_is_killed(tmp_path: Path) -> None:
    require_etcd()
    said = run(tmp_path, "bash", str(NODES / "two_nodes.sh"))
    sharded = ["+strategy=gemini_fsdp2", "trainer.strategy.data_parallel_size=2", "trainer.strategy.tensor_parallel_size=1"]
    run(tmp_path, sys.executable, str(NODES / "train.py"), "name=one", "trainer.devices=2", *sharded)
    assert losses(tmp_path / "outputs" / "two_nodes") == losses(tmp_path / "outputs" / "one")
    (line,) = [line for line in said.splitlines() if line.startswith("lightning_gemini: recovered in ")]
    assert "(127.0.0.2) at index 1 is gone" in line
    processes = {line.rpartition(" ")[2] for line in said.splitlines() if line.startswith("step ")}
    assert len(processes) == 1, "rank 0 has kept its process"
    events = [read_events(str(path)) for path in (tmp_path / "outputs" / "two_nodes" / "gemini").glob("agent-127.0.0.3-*.jsonl")]
    assert [event["step"] for event in events[0] if event["event"] == "recovered"], "the spare has taken part"
