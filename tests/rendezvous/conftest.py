"""Peers that are closed when the test is over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.peers import Peers


@pytest.fixture
def peers() -> Iterator[Peers]:
    started = Peers()
    yield started
    started.close()
