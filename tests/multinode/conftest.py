"""A laboratory per test, with an etcd of its own; what undisturbed runs gave is kept for the whole session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.multinode.lab import Expected, Lab
from tests.support.etcd import Etcd, require_etcd


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    return Expected(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def lab(tmp_path: Path, expected: Expected) -> Iterator[Lab]:
    require_etcd()
    etcd = Etcd(tmp_path / "etcd", flags=("--heartbeat-interval", "10", "--election-timeout", "100", "--unsafe-no-fsync"))
    yield Lab(tmp_path, etcd, expected)
    etcd.stop()
