"""Feeders that must have ended when their test is over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.mapped.helpers import Feeders


@pytest.fixture
def feeders() -> Iterator[Feeders]:
    started = Feeders()
    yield started
    started.close()
