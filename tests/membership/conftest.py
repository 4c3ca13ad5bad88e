"""Servers of etcd for the tests of this folder; agents that are left when a test is over are closed."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_gemini.membership.etcd import EtcdMembership
from tests.membership.helpers import Agent, Process, decide
from tests.support.etcd import Cluster, Etcd, require_etcd

QUICK = ("--heartbeat-interval", "10", "--election-timeout", "100")


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Etcd]:
    """One that serves soon after its start, and grants leases of a second."""
    require_etcd()
    server = Etcd(tmp_path, flags=QUICK)
    yield server
    server.stop()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Three that are one."""
    require_etcd()
    servers = Cluster(tmp_path)
    yield servers
    servers.stop()


@pytest.fixture
def job() -> str:
    return f"test-{uuid.uuid4().hex[:8]}"


class Start:
    """Starts agents of one job, and ends them."""

    def __init__(self, job: str) -> None:
        self.job = job
        self.agents: list[Agent] = []
        self.processes: list[Process] = []

    def agent(self, etcd: Etcd | str, node: str, nnodes: int, options: dict[str, Any] | None = None, **fields: Any) -> Agent:
        """In this process."""
        url = etcd if isinstance(etcd, str) else etcd.url
        make: Callable[[Agent], EtcdMembership] = lambda agent: EtcdMembership([url], self.job, nnodes, decide, agent, **(options or {}))  # noqa: E731
        self.agents.append(Agent(node, make, **fields))
        return self.agents[-1]

    def process(self, etcd: Etcd | Cluster, node: str, nnodes: int, **options: Any) -> Process:
        """In one of its own."""
        urls = etcd.urls if isinstance(etcd, Cluster) else [etcd.url]
        self.processes.append(Process(node, urls, self.job, nnodes, **options))
        return self.processes[-1]

    def end(self) -> None:
        for agent in self.agents:
            agent.membership.close()
        for process in self.processes:
            process.end()


@pytest.fixture
def start(job: str, request: pytest.FixtureRequest) -> Iterator[Start]:
    """See `Start`. Agents end before their servers do."""
    for server in {"etcd", "cluster"} & {*request.fixturenames}:
        request.getfixturevalue(server)
    started = Start(job)
    yield started
    started.end()
