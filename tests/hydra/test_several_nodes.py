"""Settings of several nodes and of storage, given to a Hydra script that knows nothing of us: they reach the agent that it becomes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.etcd import Certificates, Etcd, require_etcd

ROOT = Path(__file__).parents[2]
LIMIT_S = 50


def train(directory: Path, *overrides: str, **environ: str) -> tuple[int, str]:
    """Exit status and what is said."""
    line = [sys.executable, str(ROOT / "recipes" / "nodes" / "train.py"), "+strategy=gemini", "trainer.max_steps=12", "step_s=0"]
    line += [f"hydra.run.dir={directory}", "trainer.strategy.recovery.spares=0", "trainer.devices=2", *overrides]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environ}
    done = subprocess.run(line, env=env, cwd=directory, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    return done.returncode, done.stdout + done.stderr


def alone(directory: Path, etcd: Etcd, *overrides: str) -> tuple[int, str]:
    """A node of two that nobody joins."""
    given = ["trainer.num_nodes=2", f"trainer.strategy.membership.etcd=[{etcd.url}]", *overrides]
    return train(directory, *given, LIGHTNING_GEMINI_JOB=directory.name, LIGHTNING_GEMINI_TOKEN="secret")


def test_a_node_waits_for_others_in_an_etcd_with_tls(tmp_path: Path) -> None:
    require_etcd()
    made = Certificates.make(tmp_path / "tls")
    etcd = Etcd(tmp_path / "etcd", certificates=made)
    try:
        files = [f"trainer.strategy.membership.{name}={getattr(made, name)}" for name in ("ca", "cert", "key")]
        times = ["trainer.strategy.membership.join_timeout_s=1.5", "trainer.strategy.membership.lease_ttl_s=3"]
        status, said = alone(tmp_path, etcd, *files, *times)
    finally:
        etcd.stop()
    assert status == 1
    assert "1 of 2 nodes have registered after 1.5 s (membership.join_timeout_s)" in said


def test_a_user_that_etcd_does_not_know(tmp_path: Path) -> None:
    require_etcd()
    etcd = Etcd(tmp_path / "etcd")
    try:
        status, said = alone(tmp_path, etcd, "trainer.strategy.membership.user=stranger")
    finally:
        etcd.stop()
    assert status == 2
    (line,) = [line for line in said.splitlines() if line.startswith("lightning-gemini: ")]
    assert "check that membership.user='stranger' and its password may read and write" in line


@pytest.mark.timeout(120)
def test_checkpoints(tmp_path: Path) -> None:
    store = tmp_path / "store"
    given = [f"trainer.strategy.persistent.{key}" for key in (f"url={store}", "every_n_steps=3", "keep_last=1")]
    status, said = train(tmp_path, *given)
    assert status == 0, said
    (metadata,) = store.glob("step-*/.metadata")
    assert int(metadata.parent.name.split(".")[0].removeprefix("step-")) % 3 == 0
    status, said = train(tmp_path, *given, "trainer.strategy.persistent.resume=never")
    assert status == 1 and "persistent.resume='never'" in said
