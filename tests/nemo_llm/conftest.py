"""NeMo is imported once, in the parent: ranks are forked from it."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without NeMo 2.x there is nothing to run here but the pure parts."""
    try:
        found = importlib.metadata.version("nemo_toolkit").startswith("2.") and importlib.util.find_spec("nemo.collections.llm") is not None
    except importlib.metadata.PackageNotFoundError:
        found = False
    for item in items:
        if "nemo" in getattr(item, "fixturenames", ()) and "nemo_llm" in item.path.parts and not found:
            item.add_marker(pytest.mark.skip(reason="NeMo 2.x is not installed: make test-nemo-llm builds an environment for it"))


@pytest.fixture(scope="session")
def nemo() -> None:
    """Warm: importing NeMo takes longer than a test."""
    import nemo.collections.llm
    import nemo.lightning  # noqa: F401
