"""The agent ends the loader processes of its node, and what they have started."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Iterator

import pytest

from lightning_gemini.agent.loaders import Loaders

LIMIT_S = 10.0


class Group:
    """A process group: its leader, and a child of that. The pipe ends when both are gone.

    When it is asked to end, the leader ends its child and itself, or it is `stubborn`.
    """

    def __init__(self, stubborn: bool = False) -> None:
        self._reader, writer = os.pipe()
        ready, told = os.pipe()
        self.leader = os.fork()
        if self.leader == 0:
            with contextlib.suppress(BaseException):
                os.close(self._reader)
                self._lead(told, stubborn)
            os._exit(0)
        os.close(writer)
        os.close(told)
        with open(ready) as file:
            self.child = int(file.readline())

    def _lead(self, told: int, stubborn: bool) -> None:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        child = os.fork()
        if child:
            os.write(told, b"%d\n" % child)
            os.close(told)
            while signal.sigwait([signal.SIGTERM]) and stubborn:
                pass
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        else:
            os.close(told)
            signal.pause()

    def is_gone(self, timeout_s: float = LIMIT_S) -> bool:
        return bool(select.select([self._reader], [], [], timeout_s)[0])

    def reap(self) -> None:
        os.waitpid(self.leader, 0)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.leader, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            self.reap()
        assert self.is_gone()
        os.close(self._reader)


@pytest.fixture
def groups() -> Iterator[list[Group]]:
    made = [Group(), Group(stubborn=True), Group()]
    yield made
    for group in made:
        group.close()


def test_all_are_ended_with_their_children(groups: list[Group]) -> None:
    """The first when it is asked, the second by force."""
    loaders = Loaders()
    for group in groups[:2]:
        loaders.add(group.leader)
    assert len(loaders.descriptors()) == 2
    loaders.end()
    assert groups[0].is_gone() and groups[1].is_gone()
    assert not groups[2].is_gone(0), "nobody has said that this is one"
    assert loaders.descriptors() == []
    loaders.end()


def test_one_that_has_ended_already(groups: list[Group]) -> None:
    """Its number may be another process's by then: it is let alone, and its descriptor is given back with the next one."""
    loaders = Loaders()
    loaders.add(groups[0].leader)
    os.killpg(groups[0].leader, signal.SIGKILL)
    groups[0].reap()
    assert groups[0].is_gone()
    loaders.add(groups[2].leader)
    assert len(loaders.descriptors()) == 1
    loaders.end()
    assert groups[2].is_gone()


def test_one_that_ends_by_itself_meanwhile(groups: list[Group]) -> None:
    loaders = Loaders()
    loaders.add(groups[0].leader)
    os.kill(groups[0].leader, signal.SIGTERM)
    loaders.end()
    assert groups[0].is_gone() and loaders.descriptors() == []


def test_a_stopped_one(groups: list[Group]) -> None:
    os.killpg(groups[0].leader, signal.SIGSTOP)
    loaders = Loaders()
    loaders.add(groups[0].leader)
    loaders.end()
    assert groups[0].is_gone()


def test_a_number_that_no_process_has() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    loaders = Loaders()
    loaders.add(pid)
    assert loaders.descriptors() == []
    loaders.end()


def test_nobody_waits_for_none() -> None:
    Loaders().end()
