"""The agent over processes that have nothing to do with torch: whose exit status is whose, and that nothing is left behind."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_gemini.agent.messages import Left, encode
from lightning_gemini.rendezvous.link import AGENT_LOST, Link
from tests.support.jobs import run_job


def rank() -> int:
    return int(os.environ["LIGHTNING_GEMINI_RANK"])


def here(name: str = "here") -> None:
    """Say that this rank has got here."""
    draft = Path(f"draft{rank()}")
    draft.write_text(str(os.getpid()))
    draft.rename(f"{name}{rank()}")


def await_ranks(folder: Path, count: int, name: str = "here") -> list[int]:
    """Pids of the ranks that have said so."""
    paths = [folder / f"{name}{number}" for number in range(count)]
    deadline = time.monotonic() + 30
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, (folder / "output.txt").read_text() if (folder / "output.txt").exists() else paths
        time.sleep(0.005)
    return [int(path.read_text()) for path in paths]


def send(data: bytes) -> None:
    """One datagram to the agent, whatever it is."""
    with socket.socket(fileno=os.dup(int(os.environ["LIGHTNING_GEMINI_CHANNEL"]))) as sock:
        sock.send(data)


# ---- exit statuses


def test_all_done(tmp_path: Path) -> None:
    def target() -> None:
        here()
        assert os.environ["LIGHTNING_GEMINI_WORLD"] == "3" and os.environ["LIGHTNING_GEMINI_GENERATION"] == "0"

    result = run_job(tmp_path, target, 3)
    assert result.exit_status == 0, result.output
    assert len(set(await_ranks(tmp_path, 3))) == 3


@pytest.mark.parametrize("status", [1, 3, 255])
def test_a_script_that_fails_ends_the_job_with_its_status(tmp_path: Path, status: int) -> None:
    def target() -> None:
        if rank() == 1:
            sys.exit(status)
        time.sleep(60)

    result = run_job(tmp_path, target, 2)
    assert result.exit_status == status
    assert f"ended with exit status {status} outside of fit" in result.output


def test_an_exception_shows_its_traceback(tmp_path: Path) -> None:
    def target() -> None:
        raise KeyError("what the user did")

    result = run_job(tmp_path, target, 2)
    assert result.exit_status == 1 and "KeyError: 'what the user did'" in result.output


def test_a_rank_that_is_done_waits_for_no_one(tmp_path: Path) -> None:
    def target() -> None:
        if rank() == 0:
            send(encode(Left()))
            return
        await_ranks(Path(), 1, "none") if rank() == 2 else time.sleep(0.3)
        sys.exit(0)

    (tmp_path / "none0").write_text("0")
    assert run_job(tmp_path, target, 3).exit_status == 0


# ---- before the first boundary


def test_a_rank_that_dies_before_fit_starts_all_anew(tmp_path: Path) -> None:
    def target() -> None:
        if rank() == 1 and not Path("again").exists():
            Path("again").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        here()
        await_ranks(Path(), 2)

    result = run_job(tmp_path, target, 2)
    assert result.exit_status == 0, result.output
    assert "all ranks start anew" in result.output


def test_all_ranks_die_at_once_again_and_again(tmp_path: Path) -> None:
    def target() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    result = run_job(tmp_path, target, 4)
    assert result.exit_status == 1
    assert "4 faults in step -1 (recovery.max_faults_per_step=3)" in result.output and "Traceback" not in result.output


@pytest.mark.parametrize("garbage", [b"\xc1 this is no message", b"\x81\xa4type\xa7recover", encode(Left())[:-1] + b"\xff"])
def test_a_rank_that_sends_garbage_is_killed(tmp_path: Path, garbage: bytes) -> None:
    def target() -> None:
        if rank() == 1:
            send(garbage)
        time.sleep(60)

    result = run_job(tmp_path, target, 2)
    assert result.exit_status == 1
    assert "rank 1" in result.output and "sent a message that cannot be read" in result.output and "SIGKILL" in result.output


# ---- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_the_agent_is_the_end_of_everything(tmp_path: Path, number: signal.Signals) -> None:
    def target() -> None:
        Link()
        here()
        time.sleep(60)

    pids: list[int] = []

    def during(agent: int) -> None:
        pids.extend(await_ranks(tmp_path, 2))
        os.kill(agent, number)

    with reaping() as reap:
        result = run_job(tmp_path, target, 2, during=during, timeout_s=20)
        statuses = [reap(pid) for pid in pids] if number == signal.SIGKILL else []
    if number == signal.SIGTERM:
        assert result.exit_status == 143 and "ended by signal" in result.output
    else:
        assert result.exit_status == -signal.SIGKILL and statuses == [AGENT_LOST] * 2
        assert (tmp_path / "output.txt").read_text().count("its agent (pid ") == 2  # written after the agent had ended
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_stopped_rank_ends_with_its_agent_too(tmp_path: Path) -> None:
    def target() -> None:
        Link()
        here()
        time.sleep(60)

    pids: list[int] = []

    def during(agent: int) -> None:
        pids.extend(await_ranks(tmp_path, 2))
        os.kill(pids[1], signal.SIGSTOP)
        while b") T " not in Path(f"/proc/{pids[1]}/stat").read_bytes():
            time.sleep(0.001)
        os.kill(agent, signal.SIGKILL)

    with reaping() as reap:
        run_job(tmp_path, target, 2, during=during, timeout_s=20)
        assert [reap(pid) for pid in pids] == [AGENT_LOST] * 2


@pytest.mark.parametrize("first", [0, 1])
def test_ranks_that_take_sigterm_in_different_ways(tmp_path: Path, first: int) -> None:
    """One has a handler and exits with 0, the other dies of it, in either order."""

    def target() -> None:
        def handler(*_: object) -> None:
            time.sleep(0.0 if first == 0 else 0.3)
            os._exit(0)

        def late(*_: object) -> None:
            time.sleep(0.0 if first == 1 else 0.3)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

        signal.signal(signal.SIGTERM, late if rank() else handler)
        here()
        time.sleep(60)

    def during(agent: int) -> None:
        await_ranks(tmp_path, 2)
        os.kill(agent, signal.SIGTERM)

    result = run_job(tmp_path, target, 2, during=during, timeout_s=10)
    assert result.exit_status == 143


def test_sigterm_when_a_rank_has_finished_already(tmp_path: Path) -> None:
    def target() -> None:
        here()
        if rank() == 1:
            time.sleep(60)

    def during(agent: int) -> None:
        done, _ = await_ranks(tmp_path, 2)
        while Path(f"/proc/{done}").exists():
            time.sleep(0.01)
        time.sleep(0.1)
        os.kill(agent, signal.SIGTERM)

    result = run_job(tmp_path, target, 2, during=during, timeout_s=10)
    assert result.exit_status == 143 and "Traceback" not in result.output


class reaping:
    """Orphans come to this process, so that their exit status can be read: None when one is still there after 3 seconds."""

    def __enter__(self) -> Callable[[int], int | None]:
        self._adopt(1)
        return self._reap

    def __exit__(self, *_: object) -> None:
        self._adopt(0)

    @staticmethod
    def _adopt(on: int) -> None:
        pr_set_child_subreaper = 36
        assert ctypes.CDLL(None).prctl(pr_set_child_subreaper, on) == 0

    @staticmethod
    def _reap(pid: int) -> int | None:
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        return None
