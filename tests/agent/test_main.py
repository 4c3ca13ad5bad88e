"""`python -m lightning_gemini.agent`: a command line becomes a supervised job, started without torch."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from lightning_gemini.agent.spawn import ForkSpawner
from lightning_gemini.agent.supervisor import Supervisor

AGENT = [sys.executable, "-m", "lightning_gemini.agent"]


def run(*arguments: str, interpreter: tuple[str, ...] = (), cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    command = [sys.executable, *interpreter, *AGENT[1:], *arguments]
    environment = {**os.environ, "PYTHONPATH": root}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd, env=environment)


def test_the_agent_imports_neither_torch_nor_lightning() -> None:
    result = run("--help", interpreter=("-X", "importtime"))
    assert result.returncode == 0 and "--nproc-per-node" in result.stdout
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert "lightning_gemini.agent.supervisor" in imported
    heavy = {"torch", "lightning", "pytorch_lightning", "numpy", "torchmetrics", "hydra", "omegaconf"}
    assert not {name for name in imported if name.partition(".")[0] in heavy}


def test_the_agent_starts_in_less_than_a_second() -> None:
    """Of processor time: the machine may be busy."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run("--help").returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


@pytest.mark.parametrize("status", [0, 3])
def test_the_job_s_exit_status_is_the_script_s(tmp_path: Path, status: int) -> None:
    (tmp_path / "train.py").write_text(
        "import os, sys\n"
        "assert 'torch' not in sys.modules\n"
        "open('rank' + os.environ['LIGHTNING_GEMINI_RANK'], 'w').write(' '.join(sys.argv[1:]) + ' ' + os.environ['OMP_NUM_THREADS'])\n"
        f"sys.exit({status})\n"
    )
    result = run("--nproc-per-node", "2", "train.py", "--lr", "0.1", cwd=tmp_path)
    assert result.returncode == status, result.stderr
    written = [text for path in tmp_path.glob("rank*") if (text := path.read_text())]  # a rank may have been ended before it wrote
    assert written and all(text.startswith("--lr 0.1 ") and int(text.split()[-1]) >= 1 for text in written)
    assert status or len(written) == 2


def test_a_whole_command_after_two_dashes(tmp_path: Path) -> None:
    result = run("--nproc-per-node", "2", "--", "/bin/sh", "-c", 'touch "here$LIGHTNING_GEMINI_RANK"', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here0", "here1"]


def test_a_child_inherits_its_own_descriptors_and_no_others(tmp_path: Path) -> None:
    """One socket to the agent, the node's memory, and the three everybody has: an agent's end in a child would hide the agent's death."""
    (tmp_path / "look.py").write_text(
        "import os, time\n"
        "links = []\n"
        "for fd in range(3, 200):\n"
        "    try: links.append(os.readlink(f'/proc/self/fd/{fd}'))\n"
        "    except OSError: pass\n"
        "rank = os.environ['LIGHTNING_GEMINI_RANK']\n"
        "open('rank' + rank, 'w').write('\\n'.join(links))\n"
        "while not all(os.path.exists(f'rank{r}') for r in range(3)): time.sleep(0.01)\n"
    )
    result = run("--nproc-per-node", "3", "look.py", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for rank in range(3):
        links = (tmp_path / f"rank{rank}").read_text().splitlines()
        assert sum(link.startswith("socket:") for link in links) == 1, links
        assert sum(link.startswith("/memfd:gemini") for link in links) == 3 + 3 * 3, links
        assert not any("pidfd" in link or "eventpoll" in link for link in links), links


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nproc-per-node", "1", "x.py"], "--nproc-per-node=1: a rank can only be recovered by others"),
        (["--nproc-per-node", "2"], "no script given"),
        (["x.py"], "--nproc-per-node"),
        (["--nproc-per-node", "two", "x.py"], "invalid int value: 'two'"),
    ],
)
def test_what_cannot_be_run_is_refused(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2 and message in result.stderr


def test_a_command_that_does_not_exist_names_it(tmp_path: Path) -> None:
    result = run("--nproc-per-node", "2", "--", "/nowhere/python", "x.py")
    assert result.returncode not in (0, 143) and "/nowhere/python" in result.stderr


def test_the_agent_puts_signal_handlers_and_descriptors_back() -> None:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            before = signal.getsignal(signal.SIGTERM), len(os.listdir("/proc/self/fd"))
            assert Supervisor(ForkSpawner(lambda: None), 2).run() == 0
            assert (signal.getsignal(signal.SIGTERM), len(os.listdir("/proc/self/fd"))) == before
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
