"""Real torchrun commands: workers without a TCPStore, agents without one, restarts on several hosts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lightning_gemini.peers.roster import Roster
from lightning_gemini.rendezvous.torchrun import PeerRendezvous
from tests.support.meeting import free_port
from tests.support.peers import new_job

SCRIPT = str(Path(__file__).parents[1] / "support" / "scripts" / "workers.py")
LIMIT_S = 60


def torchrun(directory: Path, way: str, *options: str, **environ: str) -> subprocess.Popen[str]:
    """A command under way."""
    command = [sys.executable, "-m", "torch.distributed.run", *options, SCRIPT, str(directory), way]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environ}
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def ended(*commands: subprocess.Popen[str]) -> list[tuple[int, str]]:
    """Exit status and what was said, of each."""
    try:
        said = [command.communicate(timeout=LIMIT_S)[1] for command in commands]
    finally:
        for command in commands:
            command.kill()
    return [(command.returncode, text) for command, text in zip(commands, said, strict=True)]


def seen(directory: Path, world: int) -> list[dict[str, Any]]:
    """What the workers saw."""
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(world)]


def starts(directory: Path) -> dict[int, int]:
    """Rank -> how many processes it has been."""
    ranks = [int(path.name.split("-")[1]) for path in directory.glob("started-*")]
    return {rank: ranks.count(rank) for rank in set(ranks)}


def agents(directory: Path, way: str, ranks: Sequence[str], endpoint: str = "127.0.0.1,127.0.0.2", **environ: str) -> list[tuple[int, str]]:
    """Two agents as on two hosts, two workers each."""
    shared = ["--nnodes", "2", "--nproc-per-node", "2", "--max-restarts", "2", "--monitor-interval", "0.1", "--rdzv-backend", "gemini"]
    shared += ["--rdzv-id", new_job(), "--rdzv-endpoint", endpoint]
    return ended(*[torchrun(directory, way, *shared, "--rdzv-conf", f"rank={rank},timeout=40", **environ) for rank in ranks])


def test_workers_of_a_plain_torchrun_have_no_tcpstore(tmp_path: Path) -> None:
    """The same look at the sockets finds the TCPStore of `env://`, and the one of torchrun's agent."""
    ((status, text),) = ended(torchrun(tmp_path, "then env", "--nproc-per-node", "3", "--master-port", str(free_port())))
    assert status == 0, text
    for record in seen(tmp_path, 3):
        assert (record["sum"], record["world"], record["unix"]) == (7, 3, True)
        assert (record["master_port"], record["master_port_of_env"]) == (False, True)
        assert record["agent_listens"]


def test_with_our_backend_the_agent_has_none_either(tmp_path: Path) -> None:
    """Nor after a restart, in which the ranks meet under the names of those that died."""
    options = ["--nproc-per-node", "2", "--rdzv-backend", "gemini", "--max-restarts", "1"]
    ((status, text),) = ended(torchrun(tmp_path, "fails", *options))
    assert status == 0, text
    assert "Traceback" not in text
    assert starts(tmp_path) == {0: 2, 1: 2}
    for record in seen(tmp_path, 2):
        assert record["generation"] == 1
        assert (record["sum"], record["master_port"], record["unix"], record["agent_listens"]) == (3, False, True, [])


@pytest.fixture(scope="module")
def restarted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, str]]]:
    """Two hosts; a worker of the second fails at its first start."""
    directory = tmp_path_factory.mktemp("restarted")
    return directory, agents(directory, "fails", ["0", "1"], LIGHTNING_GEMINI_TOKEN="secret")


def test_a_failure_on_one_host_restarts_all(restarted: tuple[Path, list[tuple[int, str]]]) -> None:
    directory, ends = restarted
    assert [status for status, _ in ends] == [0, 0], ends
    assert (directory / "failed").exists()
    assert starts(directory) == {0: 2, 1: 2, 2: 2, 3: 2}


def test_all_meet_again_in_the_next_generation(restarted: tuple[Path, list[tuple[int, str]]]) -> None:
    records = seen(restarted[0], 4)
    assert [(record["sum"], record["world"], record["generation"]) for record in records] == [(15, 4, 1)] * 4


def test_there_is_no_tcpstore_on_two_hosts(restarted: tuple[Path, list[tuple[int, str]]]) -> None:
    """Each agent has one socket that listens, at its own address."""
    records = seen(restarted[0], 4)
    assert not any(record["master_port"] for record in records)
    assert [record["agent_listens"] for record in records] == [["0100007F"]] * 2 + [["0200007F"]] * 2


def test_agents_leave_in_peace(restarted: tuple[Path, list[tuple[int, str]]]) -> None:
    assert [text.count("Error waiting on exit barrier") for _, text in restarted[1]] == [0, 0]
    assert not any("secret" in text for _, text in restarted[1])


def test_an_agent_that_ends_first_still_answers_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in torchrun's barrier at the end: the last to arrive writes a key and goes, the others have yet to read it."""
    monkeypatch.setenv("LIGHTNING_GEMINI_START", "0")
    job = new_job()
    agents = [PeerRendezvous(Roster.on_one_node(job, 2), rank, job, "localhost", 30.0) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        stores = [info.store for info in pool.map(PeerRendezvous.next_rendezvous, agents)]
        keys = agents[1]._node._now.keys
        key = next(key for key in map(str, range(99)) if keys.owner(f"{job}/agents/{key}") == 1)
        stores[1].set(key, "written")
        last = pool.submit(agents[1].shutdown)
        with pytest.raises(TimeoutError):
            last.result(0.5)
        assert stores[0].get(key) == b"written"
        began = time.monotonic()
        agents[0].shutdown()
        assert last.result(5) and time.monotonic() - began < 1.0


def test_an_agent_does_not_wait_long_for_one_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_GEMINI_START", "0")
    job = new_job()
    agents = [PeerRendezvous(Roster.on_one_node(job, 2), rank, job, "localhost", 30.0) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(PeerRendezvous.next_rendezvous, agents))
    agents[1]._node.close()
    began = time.monotonic()
    agents[0].shutdown()
    assert time.monotonic() - began < 5.0


@pytest.mark.parametrize(
    ("endpoint", "rank", "message"),
    [
        ("127.0.0.1", "0", "--rdzv-endpoint='127.0.0.1' names 1 hosts, --nnodes is 2:2: name every host of the job once"),
        ("127.0.0.1,127.0.0.2", "2", "--rdzv-conf rank=2 is not a place among the hosts"),
        ("127.0.0.1,127.0.0.2", "-1", "2 of the hosts ['127.0.0.1', '127.0.0.2'] are this one: say which with --rdzv-conf"),
        ("198.51.100.1,198.51.100.2", "-1", "0 of the hosts ['198.51.100.1', '198.51.100.2'] are this one: say which with"),
        ("198.51.100.1,198.51.100.2", "0", "peers on other hosts need a secret: set LIGHTNING_GEMINI_TOKEN"),
        ("127.0.0.1:80,127.0.0.2:80", "0", "one port for all of them at the end"),
    ],
)
def test_a_wrong_host_list_is_one_error(monkeypatch: pytest.MonkeyPatch, endpoint: str, rank: str, message: str) -> None:
    from torch.distributed.elastic.rendezvous import RendezvousParameters

    from lightning_gemini.rendezvous.torchrun import create

    for name in ("LIGHTNING_GEMINI_HOSTS", "LIGHTNING_GEMINI_JOB"):
        monkeypatch.setenv(name, "")  # what it tells workers is undone
    with pytest.raises(ValueError) as refusal:
        create(RendezvousParameters("gemini", endpoint, new_job(), 2, 2, rank=rank))
    assert message in str(refusal.value)


def test_the_error_reaches_the_user(tmp_path: Path) -> None:
    ((status, text),) = agents(tmp_path, "gemini", ["0"], endpoint="127.0.0.1")
    assert status != 0 and starts(tmp_path) == {}
    assert text.rstrip().splitlines()[-1].startswith("ValueError: --rdzv-endpoint='127.0.0.1' names 1 hosts, --nnodes is 2:2")
