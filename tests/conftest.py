"""Leak police: a test that leaves a process, a thread, a descriptor or an environment variable behind fails."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch  # noqa: F401  warm parent: ranks are forked from here
import psutil
import pytest
import torch

import lightning_gemini  # noqa: F401
from tests.support.etcd import Etcd, require_etcd
from tests.support.peers import Peers

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What belongs to the campaigns is skipped outside of them."""
    for item in items:
        marker = item.get_closest_marker("campaign")
        if marker is not None and not marker.kwargs.get("always") and "GEMINI_CHAOS" not in os.environ:
            item.add_marker(pytest.mark.skip(reason="make chaos runs it"))


def unlinked_by_nobody(name: str) -> bool:
    """glibc makes a semaphore under a name of its own (six characters; Python's begin with mp-) and renames it: a DataLoader that is killed
    just then leaves that, 32 bytes, and nobody who lives knows it."""
    return re.fullmatch(r"sem\.[A-Za-z0-9]{6}", name) is not None


def of_another_job(name: str) -> bool:
    """Torch names its files after the process that made them: one that still runs is no child of ours, those are gone."""
    kind, _, pid = name.partition("_")
    return kind == "torch" and pid.split("_")[0] != str(os.getpid()) and psutil.pid_exists(int(pid.split("_")[0]))


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    me = psutil.Process()
    environment, threads, shared = dict(os.environ), threading.active_count(), set(os.listdir("/dev/shm"))
    descriptors = me.num_fds()
    yield
    children = me.children(recursive=True)
    for child in children:
        child.kill()
    psutil.wait_procs(children, timeout=5)
    assert not children, f"processes left behind: {children}"
    assert threading.active_count() <= threads, f"threads left behind: {threading.enumerate()}"
    left = {name for name in set(os.listdir("/dev/shm")) - shared if not of_another_job(name) and not unlinked_by_nobody(name)}
    assert not left, f"files left in shared memory: {left}"
    kept = 8 if request.node.get_closest_marker("torch_keeps_descriptors") else 2
    assert me.num_fds() <= descriptors + kept, "descriptors left open"
    for name in set(os.environ) - set(environment):
        if name.startswith(("LIGHTNING_GEMINI", "MASTER_", "RANK", "LOCAL_RANK", "WORLD_SIZE")):
            raise AssertionError(f"environment variable {name} left behind")


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Etcd]:
    """A real one, of one member, that serves soon after its start."""
    require_etcd()
    server = Etcd(tmp_path / "etcd", flags=("--heartbeat-interval", "10", "--election-timeout", "100", "--unsafe-no-fsync"))
    yield server
    server.stop()


@pytest.fixture
def peers() -> Iterator[Peers]:
    """Peers that are closed when the test is over."""
    started = Peers()
    yield started
    started.close()
