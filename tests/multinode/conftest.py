"""A laboratory per test, with an etcd of its own; what undisturbed runs gave is kept for the whole session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.multinode.lab import Expected, Lab
from tests.multinode.network import Network
from tests.support.etcd import Etcd, require_etcd
from tests.support.nodes import require_namespaces


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    return Expected(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def lab(tmp_path: Path, expected: Expected) -> Iterator[Lab]:
    require_etcd()
    etcd = Etcd(tmp_path / "etcd", flags=("--heartbeat-interval", "10", "--election-timeout", "100", "--unsafe-no-fsync"))
    yield Lab(tmp_path, etcd, expected)
    etcd.stop()


@pytest.fixture
def network(tmp_path: Path, expected: Expected, request: pytest.FixtureRequest) -> Iterator[Network]:
    """Its parameter: how many servers etcd has."""
    require_namespaces()
    require_etcd()
    made = Network.make(tmp_path, expected, getattr(request, "param", 1))
    yield made
    made.close()
