"""Versions that nobody has tested are named at start."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import pytest

from lightning_gemini import versions


def installed(**found: str) -> Callable[[str], str]:
    def of(name: str) -> str:
        if name not in found:
            raise PackageNotFoundError(name)
        return found[name]

    return of


def test_tested_ones_are_not_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, tested in enumerate(versions.TESTED["lightning"]):
        monkeypatch.setattr(versions, "version", installed(lightning=tested, nemo_toolkit=versions.TESTED["nemo_toolkit"][number % 2]))
        assert versions.untested() == []


def test_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", installed(lightning="2.5.1"))
    (said,) = versions.untested()
    assert said == "lightning_gemini is tested with lightning 2.4.0, 2.5.6, 2.6.6, this is 2.5.1: recovery may not be exact"


def test_the_one_that_runs_these_tests_is_tested() -> None:
    assert version("lightning") in versions.TESTED["lightning"]
