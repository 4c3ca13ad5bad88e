"""Cases that only `make chaos` runs: variations of others that `make test` does run."""

from __future__ import annotations

import pytest
from _pytest.mark.structures import ParameterSet


def more(*cases: object) -> list[ParameterSet]:
    """Values for `parametrize`; a tuple has those of several arguments."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.campaign) for case in cases]
