"""What a run leaves on disk is the same after a fault: checkpoints, the rows of a CSVLogger; and the clock of `max_time` goes on."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_gemini import GeminiStrategy
from tests.lightning import epochs
from tests.lightning.recipes import WORLD
from tests.lightning.sabotage import Strike, struck
from tests.support.jobs import Result, run_job, same
from tests.support.plain import run_plain


def monitored(directory: Path, *strikes: Strike) -> Result:
    result = run_job(directory, lambda: epochs.monitored(directory, GeminiStrategy(), *strikes), WORLD)
    assert struck(directory) == len(strikes), result.output[-6000:]
    return result


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Result:
    plain, ours = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("ours")
    lightning = run_plain(plain, lambda: epochs.monitored(plain, "ddp"), WORLD)
    result = monitored(ours)
    same(lightning, result)
    assert result.ranks[0]["epoch"] < 6 and len(set(rates(result))) > 1, "neither early stopping nor the plateau was met"
    assert_files(lightning, result)
    return result


def rates(result: Result) -> list[float]:
    return [float(row["lr"]) for row in rows(result) if row.get("lr")]


def rows(result: Result) -> list[dict[str, str]]:
    """The rows of the only metrics.csv, without ours."""
    (path,) = result.directory.rglob("metrics.csv")
    with path.open() as file:
        found = [{key: value for key, value in row.items() if value and not key.startswith("gemini/")} for row in csv.DictReader(file)]
    return [row for row in found if set(row) != {"step"}]


def checkpoints(result: Result) -> dict[str, Any]:
    return {path.name: torch.load(path, weights_only=False) for path in sorted((result.directory / "checkpoints").glob("*.ckpt"))}


def assert_files(a: Result, b: Result) -> None:
    assert rows(a) == rows(b)
    first, second = checkpoints(a), checkpoints(b)
    assert list(first) == list(second) and len(first) == 3
    assert_equal(first, second, a.directory, b.directory, "")


def assert_equal(a: Any, b: Any, here: Path, there: Path, path: str) -> None:
    """Bit for bit; paths are compared relative to the job's directory."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        left = [str(key).replace(str(here), "") for key in a]
        assert left == [str(key).replace(str(there), "") for key in b], path
        for key, x, y in zip(left, a.values(), b.values(), strict=True):
            assert_equal(x, y, here, there, f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, here, there, f"{path}/{number}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, (str, Path)):
        assert str(a).replace(str(here), "") == str(b).replace(str(there), ""), path
    else:
        assert a == b, path


CASES = [
    Strike("before save", 0, 1),
    Strike("after save", 0, 2),
    Strike("after save", 0, 3),
    Strike("after save", 1, 2),
    Strike("before save", 0, 2, "raise"),
    Strike("training", 0, 10),
    Strike("training", 0, 13, "raise"),
    Strike("validation", 0, 4),
    Strike("validation", 0, 5, "raise"),
    Strike("epoch end", 0, 0),
    Strike("epoch end", 2, 1, "raise"),
]


@pytest.mark.parametrize("fault", CASES, ids=[f"{f.kind}-{f.where.replace(' ', '_')}{f.count}-rank{f.rank}" for f in CASES])
def test_fault(tmp_path: Path, undisturbed: Result, fault: Strike) -> None:
    result = monitored(tmp_path, fault)
    same(undisturbed, result)
    assert len(result.recoveries) == 1
    assert_files(undisturbed, result)
    (path,) = tmp_path.rglob("metrics.csv")
    assert "gemini/recovery_s" in path.read_text().splitlines()[0]


@pytest.mark.parametrize("fault", [Strike("training", 1, 4), Strike("training", 0, 5, "raise")], ids=["kill", "raise"])
def test_max_time(tmp_path: Path, fault: Strike) -> None:
    """All ranks stop at the same step, and the clock neither starts anew nor counts anything twice."""
    result = run_job(tmp_path, lambda: epochs.timed(tmp_path, GeminiStrategy(), fault), WORLD)
    assert result.exit_status == 0, result.output[-6000:]
    assert struck(tmp_path) == len(result.recoveries) == 1
    records = [json.loads((tmp_path / f"timer{rank}.json").read_text()) for rank in range(WORLD)]
    assert len({record["steps"] for record in records}) == 1
    for record in records:
        assert record["elapsed"] == pytest.approx(record["lasted"], abs=0.5), record
