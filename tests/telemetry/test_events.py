"""One JSONL file of events per process: whole lines, also after a kill; a disk that is full does not stop the training."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from lightning_gemini.telemetry.events import EventLog, read_events


def path(folder: Path, name: str = "rank0") -> str:
    return str(folder / f"{name}.jsonl")


def test_what_was_emitted_is_read(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path / "new" / "folder"), "rank0", "job-1")
    before = time.time()
    log.emit("joined", rank=0, spare=False)
    log.emit("recovered", seconds={"detect": 0.5}, reason="naïve “quotes”\nand lines")
    log.close()
    first, second = read_events(path(tmp_path / "new" / "folder"))
    assert (first["event"], first["rank"], first["spare"], first["pid"], first["job"]) == ("joined", 0, False, os.getpid(), "job-1")
    assert before <= first["time"] <= time.time()
    assert 0 < first["monotonic_ns"] <= second["monotonic_ns"] <= time.monotonic_ns()
    assert second["seconds"] == {"detect": 0.5} and second["reason"] == "naïve “quotes”\nand lines"


def test_one_line_each(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path), "agent")
    for number in range(5):
        log.emit("e", text="\n" * number)
    log.close()
    lines = Path(path(tmp_path, "agent")).read_text().splitlines()
    assert len(lines) == 5 and all(json.loads(line)["event"] == "e" for line in lines)


def test_a_successor_appends(tmp_path: Path) -> None:
    for number in range(3):
        log = EventLog(str(tmp_path), "rank0")
        log.emit("joined", number=number)
        log.close()
    assert [event["number"] for event in read_events(path(tmp_path))] == [0, 1, 2]


def test_a_torn_line_costs_only_itself(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path), "rank0")
    log.emit("whole")
    log.close()
    with open(path(tmp_path), "a") as file:
        file.write('{"event": "torn", "tim')
    assert [event["event"] for event in read_events(path(tmp_path))] == ["whole"]
    log = EventLog(str(tmp_path), "rank0")
    log.emit("of the successor")
    log.close()
    assert [event["event"] for event in read_events(path(tmp_path))] == ["whole", "of the successor"]


def test_a_full_disk_is_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rank0.jsonl").symlink_to("/dev/full")
    log = EventLog(str(tmp_path), "rank0")
    for _ in range(3):
        log.emit("e")
    log.close()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and path(tmp_path) in error and "No space left" in error and "training goes on" in error


def test_closed_is_silent(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path), "rank0")
    log.close()
    log.close()
    log.emit("too late")
    assert read_events(path(tmp_path)) == []


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        EventLog(str(tmp_path / "file" / "folder"), "rank0")


def test_threads_and_processes_do_not_mix_their_lines(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path), "rank0")
    pid = os.fork()
    writers = [threading.Thread(target=lambda: [log.emit("e", fill="x" * 300) for _ in range(100)]) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    log.close()
    events = read_events(path(tmp_path))
    assert len(events) == 600 and len(Path(path(tmp_path)).read_text().splitlines()) == 600


def test_after_a_kill_every_line_but_the_last_is_whole(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        log = EventLog(str(tmp_path), "rank0")
        while True:
            log.emit("e", fill="y" * 2000)
    while not os.path.exists(path(tmp_path)) or os.path.getsize(path(tmp_path)) < 100_000:
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    lines = Path(path(tmp_path)).read_text().splitlines()
    assert len(read_events(path(tmp_path))) in (len(lines), len(lines) - 1)


def test_a_forked_child_keeps_the_file_and_exec_does_not(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path), "rank0")
    held = [fd for fd in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{fd}") == path(tmp_path)]
    assert held and not any(os.get_inheritable(int(fd)) for fd in held)
    log.close()
