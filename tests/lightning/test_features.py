"""Each feature of Lightning with a fault in it: bit-identical to the undisturbed run, and that to Lightning's own DDP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.strategies import DDPStrategy

from lightning_gemini import GeminiStrategy
from tests.lightning import epochs, recipes
from tests.lightning.recipes import WORLD
from tests.lightning.sabotage import Strike, struck
from tests.support.jobs import Result, run_job, same
from tests.support.plain import run_plain

Recipe = Callable[..., None]
UNUSED = {"find_unused_parameters": True}
RECIPES: dict[str, tuple[Recipe, dict[str, Any]]] = {
    "accumulating": (recipes.accumulating, {}),
    "scaling": (recipes.scaling, {}),
    "gan": (recipes.gan, UNUSED),
    "choosing": (recipes.choosing, UNUSED),
    "streaming": (recipes.streaming, {}),
    "streaming_with_workers": (recipes.streaming_with_workers, {}),
    "workers": (recipes.workers, {}),
    "resumed": (recipes.resumed, {}),
    "monitored": (epochs.monitored, {}),
    "counted": (epochs.counted, {}),
}
PLACES = {"forward", "backward", "optimizer", "after_step", "before_step", "callback"}


class Jobs:
    """Undisturbed runs, once per recipe."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._done: dict[str, Result] = {}

    def undisturbed(self, name: str) -> Result:
        if name not in self._done:
            recipe, arguments = RECIPES[name]
            if name == "resumed" and not (self.directory / "first.ckpt").exists():
                run_plain(self.directory / "first", lambda: recipes.first(self.directory / "first", "ddp"), WORLD)
            plain = self.directory / f"{name}-plain"
            lightning = run_plain(plain, lambda: recipe(plain, DDPStrategy(**arguments)), WORLD)
            result = job(name, self.directory / name, ())
            same(lightning, result)
            self._done[name] = result
        return self._done[name]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    yield Jobs(tmp_path_factory.mktemp("undisturbed"))


def job(name: str, directory: Path, faults: tuple[Strike, ...]) -> Result:
    """Strikes at a place that `lightning_gemini.faults` knows go to the strategy, the others to the recipe."""
    recipe, arguments = RECIPES[name]
    configured: list[Any] = [{"kind": f.kind, "rank": f.rank, "step": f.count, "where": f.where} for f in faults if f.where in PLACES]
    strikes = [fault for fault in faults if fault.where not in PLACES]
    result = run_job(directory, lambda: recipe(directory, GeminiStrategy(faults=configured, **arguments), *strikes), WORLD)
    assert result.injected + struck(directory) == len(faults), result.output[-6000:]
    return result


CASES = [
    ("accumulating", Strike("training", 1, 3)),  # not the final micro-batch
    ("accumulating", Strike("training", 1, 0)),
    ("accumulating", Strike("training", 0, 5)),  # the final one
    ("accumulating", Strike("training", 2, 4, "raise")),
    ("accumulating", Strike("training", 1, 5, "raise")),
    ("accumulating", Strike("optimizer", 1, 3)),
    ("accumulating", Strike("backward", 1, 3, "raise")),
    ("accumulating", Strike("validation", 2, 1)),
    ("accumulating", Strike("validation", 1, 1, "raise")),
    ("scaling", Strike("backward", 1, 3)),
    ("scaling", Strike("optimizer", 1, 4)),
    ("scaling", Strike("optimizer", 1, 4, "raise")),
    ("scaling", Strike("forward", 0, 5, "raise")),
    ("scaling", Strike("after_step", 2, 3)),
    ("scaling", Strike("after_step", 2, 1)),  # DDP rebuilds its buckets after the first step
    ("gan", Strike("training", 1, 3)),
    ("gan", Strike("between writes", 1, 4)),
    ("gan", Strike("between writes", 1, 5)),
    ("gan", Strike("between writes", 0, 5, "raise")),
    ("gan", Strike("after_step", 2, 7)),
    ("choosing", Strike("training", 1, 4)),
    ("choosing", Strike("backward", 2, 5, "raise")),
    ("choosing", Strike("optimizer", 0, 6)),
    ("streaming", Strike("training", 1, 4)),
    ("streaming", Strike("validation", 0, 1)),
    ("streaming", Strike("after_step", 1, 4, "raise")),
    ("streaming_with_workers", Strike("training", 1, 3)),
    ("streaming_with_workers", Strike("training", 0, 10)),
    ("streaming_with_workers", Strike("before_step", 1, 0, "raise")),
    ("streaming_with_workers", Strike("after_step", 1, 7)),
    ("workers", Strike("training", 0, 3)),
    ("accumulating", Strike("training", 1, 0, "raise")),
    ("resumed", Strike("training", 1, 11)),
    ("resumed", Strike("validation", 1, 1, "raise")),
    ("counted", Strike("training", 1, 5)),
    ("counted", Strike("validation", 0, 1)),
    ("counted", Strike("epoch end", 1, 0)),
    ("counted", Strike("epoch end", 2, 1, "raise")),
    ("counted", Strike("callback", 1, 5, "raise")),
    ("counted", Strike("test", 1, 1)),
]


IDS = [f"{name}-{fault.kind}-{fault.where.replace(' ', '_')}{fault.count}-rank{fault.rank}" for name, fault in CASES]


@pytest.mark.parametrize(("name", "fault"), CASES, ids=IDS)
def test_fault(tmp_path: Path, jobs: Jobs, name: str, fault: Strike) -> None:
    expected = jobs.undisturbed(name)
    (tmp_path / "first.ckpt").symlink_to(jobs.directory / "first.ckpt")
    result = job(name, tmp_path / "job", (fault,))
    same(expected, result)
    assert len(result.recoveries) == 1


def test_an_error_in_test_ends_the_job(tmp_path: Path) -> None:
    """After `fit` there is no boundary to go back to: an exception is the script's own, and its exit status the job's."""
    result = job("counted", tmp_path, (Strike("test", 1, 1, "raise"),))
    assert result.exit_status == 1 and not result.recoveries
