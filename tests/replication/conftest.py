"""What is closed when the test is over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.replication.helpers import Child, Cluster


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    yield made
    made.close()


@pytest.fixture
def children() -> Iterator[list[Child]]:
    """Forked processes; those that a test puts here are ended."""
    made: list[Child] = []
    yield made
    for child in made:
        child.end()
