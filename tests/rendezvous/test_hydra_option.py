"""`+rendezvous=peer` on the command line of a script that knows nothing of us: no TCPStore, the same bits; wrong options end it at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from lightning_gemini.config import RendezvousConfig
from tests.support.pack import ROOT, same_defaults, same_text

SCRIPT = str(ROOT / "tests" / "support" / "scripts" / "plain_hydra.py")


def start(directory: Path, *overrides: str) -> subprocess.Popen[str]:
    """The user's script."""
    line = [sys.executable, SCRIPT, f"directory={directory}", f"hydra.run.dir={directory}/hydra", *overrides]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=directory, env=env)


def said(command: subprocess.Popen[str]) -> str:
    """What it has said when it ends. Where it does not, all its processes say where they hang."""
    try:
        return command.communicate(timeout=60)[1]
    except subprocess.TimeoutExpired:
        for process in (*psutil.Process(command.pid).children(recursive=True), command):
            process.send_signal(signal.SIGABRT)
        raise AssertionError(f"{command.args} hangs:\n{command.communicate(timeout=20)[1]}") from None
    finally:
        command.kill()


def trained(directory: Path, *overrides: str) -> list[dict[str, Any]]:
    """What both ranks saw."""
    command = start(directory, *overrides)
    text = said(command)
    assert command.returncode == 0, text[-4000:]
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The script as it is, with Lightning's DDP."""
    return trained(tmp_path_factory.mktemp("plain"))


def test_an_unchanged_script_trains_the_same_without_a_tcpstore(tmp_path: Path, plain: list[dict[str, Any]]) -> None:
    peer = trained(tmp_path, "+rendezvous=peer")
    assert [record["tcpstore"] for record in plain] == [True, True], "the look at the sockets must see a TCPStore"
    assert [record["tcpstore"] for record in peer] == [False, False]
    assert [record["ours"] for record in plain + peer] == [False, False, True, True], "the option alone brings us in"
    assert [record["losses"] for record in peer] == [record["losses"] for record in plain]
    assert [record["parameters"] for record in peer] == [record["parameters"] for record in plain]
    assert all(len(record["losses"]) == 4 for record in peer) and peer[0]["losses"] != peer[1]["losses"]


@pytest.mark.campaign
def test_fsdp2_too(tmp_path: Path, plain: list[dict[str, Any]]) -> None:
    """Between two ranks a sum has one order, so that the losses of DDP are those of FSDP2 to the bit."""
    peer = trained(tmp_path, "+rendezvous=peer", "parallel=fsdp2")
    assert [record["tcpstore"] for record in peer] == [False, False]
    assert [record["losses"] for record in peer] == [record["losses"] for record in plain]
    assert peer[0]["parameters"] != peer[1]["parameters"], "each rank has a shard of its own"


WRONG = {
    "rendezvous.port=hello": "rendezvous.port='hello' is not valid: Expected `int | null`, got `str`",
    "+rendezvous.hostz=1": "unknown key 'rendezvous.hostz': did you mean 'hosts'? Known keys are hosts, port, job",
}


def test_a_wrong_option_is_one_line_and_no_training(tmp_path: Path) -> None:
    commands = {override: start(tmp_path, "+rendezvous=peer", override) for override in WRONG}
    texts = {override: said(command) for override, command in commands.items()}
    for override, message in WRONG.items():
        assert commands[override].returncode == 1
        (line,) = texts[override].strip().splitlines()
        assert line.startswith(f"lightning_gemini: {message}")
    assert not list(tmp_path.glob("rank*.json"))


# ---- the file of the pack


def test_yaml_equals_the_dataclass() -> None:
    same_defaults("+rendezvous=peer", "rendezvous", RendezvousConfig)


def test_yaml_says_of_each_key_what_the_dataclass_says() -> None:
    same_text("rendezvous/peer.yaml", RendezvousConfig)
