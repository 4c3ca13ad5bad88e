"""A launcher that starts a process per rank: one is the agent, the others end as it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest

from lightning_gemini.agent import waiting
from lightning_gemini.agent.waiting import Door, _address, wait


def others(job: str, count: int) -> list[int]:
    """Forked processes that wait and exit with what they are told."""
    pids = []
    for _ in range(count):
        pid = os.fork()
        if not pid:
            status = 77
            try:
                status = wait(job, "0")
            finally:
                os._exit(status)
        pids.append(pid)
    return pids


def statuses(pids: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


@pytest.mark.parametrize("status", [0, 3, 143])
def test_they_end_with_the_agents_status(status: int) -> None:
    job = uuid.uuid4().hex
    early = others(job, 2)
    door = Door(job, "0")
    late = others(job, 1)
    knocking(job, 3)
    door.close(status)
    assert statuses(early + late) == [status] * 3


def test_who_comes_when_the_agent_has_ended_is_waited_for() -> None:
    job = uuid.uuid4().hex
    door, served = Door(job, "0"), list[int]()
    closing = threading.Thread(target=lambda: door.close(3, expected=3))
    closing.start()
    for count in (2, 1):
        served += statuses(others(job, count))
    closing.join(10)
    assert served == [3] * 3 and not closing.is_alive()


def test_who_never_comes_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_LATE_S", 0.2)
    Door(uuid.uuid4().hex, "0").close(0, expected=1)


def test_an_agent_that_is_killed_is_a_failure() -> None:
    job = uuid.uuid4().hex
    ready, tell = os.pipe()
    agent = os.fork()
    if not agent:
        door = Door(job, "0")
        os.write(tell, b"x")
        signal.pause()
        door.close(0)
    os.read(ready, 1)
    waiting = others(job, 2)
    knocking(job, 2)
    os.kill(agent, signal.SIGKILL)
    assert statuses(waiting) == [1, 1]
    os.waitpid(agent, 0)
    os.close(ready)
    os.close(tell)


def test_two_agents_of_one_job_on_a_node() -> None:
    job = uuid.uuid4().hex
    door = Door(job, "0")
    Door(job, "1").close(0)  # another node on the same kernel
    with pytest.raises(ValueError, match="has an agent on this node already"):
        Door(job, "0")
    door.close(0)


def knocking(job: str, count: int) -> None:
    """Until so many wait at the socket."""
    name, deadline = _address(job, "0")[1:], time.monotonic() + 30
    while sum(f"@{name}" in line for line in Path("/proc/net/unix").read_text().splitlines()) < count + 1:
        assert time.monotonic() < deadline, f"{count} processes did not come"
        time.sleep(0.01)


def test_under_torchrun_one_process_becomes_the_agent(tmp_path: Path) -> None:
    """As torchrun starts them: LOCAL_RANK 0 supervises two ranks, LOCAL_RANK 1 waits for it."""
    (tmp_path / "script.py").write_text("import os, sys\nopen('rank' + os.environ['LIGHTNING_GEMINI_RANK'], 'w').close()\nsys.exit(0)\n")
    environ = {**os.environ, "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": uuid.uuid4().hex}
    environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    command = [sys.executable, "-m", "lightning_gemini.agent", "script.py"]
    started = [subprocess.Popen(command, cwd=tmp_path, env={**environ, "LOCAL_RANK": str(local)}) for local in range(2)]
    assert [process.wait(60) for process in started] == [0, 0]
    assert sorted(path.name for path in tmp_path.glob("rank*")) == ["rank0", "rank1"]
