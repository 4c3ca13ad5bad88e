"""Feeders that must have ended when their test is over."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tests.mapped.helpers import Feeders


@pytest.fixture(scope="session", autouse=True)
def long_lived() -> None:
    """What has been imported is not looked at again by each collection of these tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def feeders() -> Iterator[Feeders]:
    started = Feeders()
    yield started
    started.close()
