"""Undisturbed runs are made once for each job."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from tests.support.jobs import Result

if TYPE_CHECKING:  # it is skipped where transformers or peft is missing
    from tests.llama.models import Job


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Job], Result]:
    """The run of a job that nobody disturbs."""
    known: dict[str, Result] = {}

    def run(job: Job) -> Result:
        if repr(job) not in known:
            known[repr(job)] = job.run(tmp_path_factory.mktemp("undisturbed"))
        return known[repr(job)]

    return run
