"""File systems that fail at any write, fill up or vanish, and processes killed at any moment: never a half checkpoint in the list."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from torch.distributed import checkpoint as dcp

from lightning_gemini.snapshot.slots import CorruptSnapshot, SlotFile
from lightning_gemini.storage import catalog, gather, layout, messages
from lightning_gemini.storage.messages import Committed, Copied, Failed, Written
from tests.storage.helpers import Node, files_of, nodes, serve
from tests.storage.test_process import STEP, fill, persist, replicated, tensors

MIB = 1 << 20


class Named(LocalFileSystem):  # type: ignore[misc]
    """A local file system by another name."""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = super()._strip_protocol(path.removeprefix(f"{cls.protocol}://"))  # before 2026 fsspec knew its own two names only
        return stripped


class Faulty(Named):
    """Fails at the n-th opened, renamed or removed file."""

    protocol = "faulty"
    left, number = 10**9, errno.ENOSPC

    def _count(self) -> None:
        Faulty.left -= 1
        if Faulty.left < 0:
            raise OSError(Faulty.number, os.strerror(Faulty.number))

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if "r" not in mode:
            self._count()
        return super().open(path, mode, **options)

    def mv(self, *paths: str, **options: Any) -> None:
        self._count()
        super().mv(*paths, **options)

    def rm_file(self, path: str) -> None:
        if Faulty.left < 0:
            self._count()
        super().rm_file(path)


fsspec.register_implementation("faulty", Faulty, clobber=True)


def failing_after(count: int, number: int = errno.ENOSPC) -> Callable[[], None]:
    def target() -> None:
        Faulty.left, Faulty.number = count, number
        serve()

    return target


def attempt(node: Node, url: str, step: int, name: str = "a") -> list[str]:
    """Persist and commit; the errors."""
    path = f"{url}/{layout.directory(step, name)}"
    node.send(messages.Persist, path=path, step=step, node=0, places=node.places())
    copied, written = node.hear(Copied), node.process and node.process.receive(wait=True)
    assert copied.step == step
    if isinstance(written, Failed):
        return [written.error]
    assert isinstance(written, Written)
    node.send(messages.Commit, path=path, step=step, nodes=[0], keep_last=1)
    answer = node.process and node.process.receive(wait=True)
    return [answer.error] if isinstance(answer, Failed) else [answer.warning] if isinstance(answer, Committed) and answer.warning else []


def loads(url: Path) -> bool:
    """Whether the newest checkpoint is whole, as DCP sees it."""
    found = catalog.newest(str(url))
    assert found is not None
    state = {"state": {key.replace("/", "_"): tensor * 0 for key, tensor in tensors().items()}}
    dcp.load(state, checkpoint_id=found.path)
    expected = tensors()["param/a"]
    return bool(state["state"]["param_a"].equal(expected))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails(number: int, tmp_path: Path) -> None:
    """At each write of a persist in turn: an error, no trace in the list, the one before stays; the next attempt succeeds."""
    url = f"faulty://{tmp_path}"
    failed = 0
    with nodes([0]) as (node,):
        fill([node], replicated(1), 1)
        persist([node], url, 1)
        node.end()
        for count in range(20):
            fill([node], replicated(1), 2)
            node.start(failing_after(count, number))
            errors = attempt(node, url, 2, f"n{count}")
            node.end()
            if not errors:
                break
            failed += 1
            words = "is full" if number == errno.ENOSPC else "cannot be used"
            assert words in errors[0] and url in errors[0]
            assert [found.step for found in catalog.complete(str(tmp_path))] == [1]
    assert failed >= 8
    assert [found.step for found in catalog.complete(str(tmp_path))] == [2] and loads(tmp_path)


class Stays(Named):
    """Old checkpoints may not be removed."""

    protocol = "stays"

    def rm_file(self, path: str) -> None:
        if "step-1." in path:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), path)
        super().rm_file(path)


fsspec.register_implementation("stays", Stays, clobber=True)


def test_retention_that_fails_is_a_warning(tmp_path: Path) -> None:
    url = f"stays://{tmp_path}"
    with nodes([0]) as (node,):
        fill([node], replicated(1), 1)
        persist([node], url, 1)
        fill([node], replicated(1), 2)
        node.persist(f"{url}/step-2.a", 2)
        done = node.ask(messages.Commit, Committed, path=f"{url}/step-2.a", step=2, nodes=[0], keep_last=1)
        assert done.removed == [] and "Operation not permitted" in done.warning
    assert [found.step for found in catalog.complete(str(tmp_path))] == [1, 2]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    libc = ctypes.CDLL(None, use_errno=True)
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or libc.mount(b"tmpfs", str(place).encode(), b"tmpfs", 0, b"size=1m"):
        pytest.skip("only root can mount a file system")
    yield place
    assert libc.umount2(str(place).encode(), 2) == 0


def test_a_full_disk(small_disk: Path) -> None:
    """The error names it; what was written goes again; with room, the next attempt succeeds."""
    with nodes([0]) as (node,):
        fill([node], replicated(1), 1)
        persist([node], small_disk, 1)
        ballast = small_disk / "ballast"
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        for room in range(0, 24 << 10, 4 << 10):
            ballast.write_bytes(bytes(free - room))
            fill([node], replicated(1), 2)
            (error,) = attempt(node, str(small_disk), 2, f"r{room}")
            assert f"persistent.url='{small_disk}" in error and "is full" in error and "lower persistent.keep_last" in error
            assert [found.step for found in catalog.complete(str(small_disk))] == [1]
            node.ask(messages.Discard, messages.Discarded, path=f"{small_disk}/step-2.r{room}")
            assert sorted(found.name for found in small_disk.iterdir()) == ["ballast", "step-1.a"]
            ballast.unlink()
        assert attempt(node, str(small_disk), 2) == []
    assert [found.step for found in catalog.complete(str(small_disk))] == [2] and loads(small_disk)


def test_a_place_that_vanishes(tmp_path: Path) -> None:
    with nodes([0]) as (node,):
        fill([node], replicated(1))
        path = f"{tmp_path}/step-7.a"
        node.persist(path, STEP)
        os.rename(tmp_path / "step-7.a", tmp_path / "gone")
        refused = node.ask(messages.Commit, Failed, path=path, step=STEP, nodes=[0])
        assert "cannot be used" in refused.error
        node.ask(messages.Discard, messages.Discarded, path=path)
    assert catalog.complete(str(tmp_path)) == []


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """What is listed is whole, what is not is removed by the next that succeeds; other people's files stay."""
    (tmp_path / "mine.txt").write_text("mine")
    source = random.Random(11)
    killed = 0
    with nodes([0, 1]) as (node,):
        fill([node], replicated(2), 1)
        persist([node], tmp_path, 1)
        began = time.monotonic()
        fill([node], replicated(2), 2)
        persist([node], tmp_path, 2)
        takes_s = time.monotonic() - began
        for step in range(3, 28):
            fill([node], replicated(2), step)
            path = f"{tmp_path}/{layout.directory(step, 'k')}"
            assert node.process is not None
            timer = threading.Timer(source.random() * takes_s * 1.1, node.process.child.kill)
            timer.start()
            killed += not _try(node, path, step)
            timer.join()
            node.end(kill=True)
            listed = catalog.complete(str(tmp_path))
            assert [found.step for found in listed[:-1]] == sorted(found.step for found in listed[:-1]) and listed
            assert loads(tmp_path), listed
            node.start()
        fill([node], replicated(2), 99)
        persist([node], tmp_path, 99)
        node.ask(messages.Commit, Committed, path=f"{tmp_path}/step-99.a", step=99, nodes=[0], keep_last=1)
    assert killed >= 5
    assert files_of(tmp_path) == sorted(["mine.txt", *(f"step-99.a/{name}" for name in files_of(tmp_path / "step-99.a"))])


def _try(node: Node, path: str, step: int) -> bool:
    """Persist and commit with a process that may die; whether it lived to say that it is done."""
    assert node.process is not None
    try:
        node.send(messages.Persist, path=path, step=step, node=0, places=node.places())
        if not isinstance(node.process.receive(wait=True), Copied) or not isinstance(node.process.receive(wait=True), Written):
            return False
        node.send(messages.Commit, path=path, step=step, nodes=[0], keep_last=3)
        return isinstance(node.process.receive(wait=True), Committed)
    except (BrokenPipeError, ConnectionResetError):
        return False


def test_an_arena_that_is_overwritten_while_it_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody holds a capture back here: the copy must notice."""
    with nodes([0]) as (node,):
        fill([node], replicated(1), 1)
        fill([node], replicated(1), 2)
        copy = gather._Arena.copy
        file = SlotFile(node.arenas[0])

        def late(self: gather._Arena, *rest: Any) -> None:
            copy(self, *rest)
            if file.find(1) is not None:
                fill([node], replicated(1), 3)

        monkeypatch.setattr(gather._Arena, "copy", late)
        with pytest.raises(CorruptSnapshot, match="rank 0 has overwritten its tensors of step 1 while they were copied"):
            gather.gather(node.places(), [file], 1)
        monkeypatch.undo()
        assert gather.gather(node.places(), [file], 3).boxes
        file.close()


def test_the_agent_has_gone(tmp_path: Path) -> None:
    """End of file ends the process, with status 0."""
    with nodes([0]) as (node,):
        process = node.start()
        node.ask(messages.Open, messages.Opened, url=str(tmp_path))
        assert process.close() == 0
        assert process.child.exit_code == 0


class Hangs(LocalFileSystem):  # type: ignore[misc]
    """Does not answer, as a network file system whose server has gone."""

    protocol = "hangs"

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        signal.pause()


fsspec.register_implementation("hangs", Hangs, clobber=True)


def hanging(node: Node, tmp_path: Path) -> int:
    """A process that is in the middle of a request; a pidfd of it."""
    fill([node], replicated(1))
    node.send(messages.Persist, path=f"hangs://{tmp_path}/step-7.a", step=STEP, node=0, places=node.places())
    node.hear(Copied)
    assert node.process is not None
    return node.process.child.pid


def ended(pid: int) -> bool:
    """Within ten seconds."""
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            return bool(poll.poll(10_000))
        finally:
            os.close(fd)
    return True


def test_a_file_system_that_hangs(tmp_path: Path) -> None:
    """The arenas are free and the agent can end the process at any time."""
    with nodes([0]) as (node,):
        hanging(node, tmp_path)
        assert node.process is not None and node.process.close(limit_s=0.1) == -signal.SIGKILL


def test_an_agent_that_is_killed_takes_it_along(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    agent = os.fork()
    if agent == 0:
        with nodes([0]) as (node,):
            os.write(writer, str(hanging(node, tmp_path)).encode())
            signal.pause()
    os.close(writer)
    pid = int(os.read(reader, 20))
    os.close(reader)
    os.kill(agent, signal.SIGKILL)
    os.waitpid(agent, 0)
    assert ended(pid)


def test_a_message_that_is_none(tmp_path: Path) -> None:
    with nodes([0]) as (node,):
        process = node.start()
        process.channel.send(b"\xc1")
        assert process.receive(wait=True) is None
        assert process.close() == 1
