"""Checkpoints of real Lightning jobs: read by plain DCP tools, by Lightning itself, and with other numbers of ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lightning_gemini.storage import layout, messages
from tests.storage.helpers import Node, nodes
from tests.storage.lightning import Net, State, left, resumed, same

STEP = 3
BATCH = STEP if not pl.__version__.startswith("2.4.") else STEP - 1
"""Where plain Lightning goes on after step 3; 2.4 does the last batch of a checkpoint in mid-epoch again, also of its own."""


def persisted(url: Path, made: list[Node]) -> Path:
    """The checkpoint of what is in the arenas."""
    path = f"{url}/{layout.directory(STEP, 'a')}"
    for node in made:
        node.persist(path, STEP, node.number, len(made))
    made[0].ask(messages.Commit, messages.Committed, path=path, step=STEP, nodes=[node.number for node in made])
    return Path(path)


@pytest.fixture(scope="module", params=["fsdp2", "ddp"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, State]:
    """Of two ranks on two nodes."""
    with nodes([0], [1]) as made:
        state = left(request.param, made, STEP)
        return request.param, persisted(tmp_path_factory.mktemp("tier"), made), state


def test_a_sharded_job_goes_on_from_it(checkpoint: tuple[str, Path, State]) -> None:
    _, path, state = checkpoint
    for size in (1, 2, 4):
        found = resumed("fsdp2", size, path)
        same(found.state, state)
        assert (found.step, found.batch) == (STEP, BATCH)
        assert found.sum == 1.5 * 5, "callbacks' state goes on"


@pytest.mark.parametrize("tool", ["lightning", "dcp"])
def test_a_plain_file_of_it_is_loaded_everywhere(checkpoint: tuple[str, Path, State], tool: str, tmp_path: Path) -> None:
    _, path, state = checkpoint
    file = tmp_path / "plain.ckpt"
    if tool == "dcp":
        dcp_to_torch_save(path, file)
    else:
        command = [sys.executable, "-m", "lightning.fabric.utilities.consolidate_checkpoint", str(path), "--output_file", str(file)]
        subprocess.run(command, check=True, timeout=60)
    found = resumed("ddp", 1, file)
    same(found.state, state)
    assert (found.step, found.batch) == (STEP, BATCH)
    same(resumed("fsdp2", 2, file).state, state)
    model = Net.load_from_checkpoint(file)
    assert model.hparams.width == 10
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
