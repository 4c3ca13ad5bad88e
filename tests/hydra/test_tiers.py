"""Each tier of `docs/adoption.md`, alone, in a plain Lightning and Hydra script: the bits are those without it, and it does on a fault what
its page says. (The same for a NeMo script is in tests/nemo.)"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.jobs import Result, run_job
from tests.support.plain import run_plain
from tests.support.sockets import uses

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "data"
WORLD, STEPS = 2, 24
TEXT = "".join(f"line {number} of a text that is long enough for two epochs\n" for number in range(256))
"""14 steps an epoch."""
KILL = "{kind:kill,rank:1,step:5,where:backward}"
RAISE = "{kind:raise,rank:0,step:16,where:forward}"
ALL_WRITING = ",".join(f"{{kind:kill,rank:{rank},step:5,where:optimizer}}" for rank in range(WORLD))


def script(base: Path, *overrides: str) -> Callable[[], None]:
    """The user's command line, for a process whose folder is the run's."""

    def main() -> None:
        data = [f"data.train={base}/text.txt", f"data.cache_directory={base}/cache"]
        sys.argv = [str(RECIPE / "train.py"), "hydra.run.dir=.", f"trainer.max_steps={STEPS}", *data, *overrides]
        sys.orig_argv[1:] = sys.argv
        sys.path.insert(0, str(RECIPE))
        runpy.run_path(sys.argv[0], run_name="__main__")
        if "MASTER_PORT" in os.environ:
            Path(f"tcpstore{os.environ['LOCAL_RANK']}").write_text(str(uses(int(os.environ["MASTER_PORT"]))))

    return main


def plain(base: Path, name: str, *overrides: str) -> Result:
    """Under Lightning's own DDP."""
    result = run_plain(base / name, script(base, *overrides), WORLD)
    assert result.exit_status == 0, result.output[-4000:]
    return result


def gemini(base: Path, name: str, *overrides: str, faults: str) -> Result:
    overrides = (*overrides, f"trainer.strategy.faults=[{faults}]", "trainer.strategy.recovery.spares=2")
    return run_job(base / name, script(base, *overrides), WORLD)


def tcpstore(result: Result) -> set[str]:
    return {(result.directory / f"tcpstore{rank}").read_text() for rank in range(WORLD)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("tiers")
    (base / "text.txt").write_text(TEXT)
    return base


@pytest.fixture(scope="module")
def mapped(base: Path) -> Result:
    """A loader process leaves the rank's random numbers alone, a DataLoader in the rank draws one an epoch."""
    return plain(base, "mapped", "+data=mmap")


def test_rendezvous(base: Path) -> None:
    without, result = plain(base, "plain"), plain(base, "rendezvous", "+recovery=rendezvous")
    assert len(result.ranks) == WORLD and result.ranks == without.ranks
    assert (tcpstore(without), tcpstore(result)) == ({"True"}, {"False"})


def test_data(base: Path, mapped: Result) -> None:
    """The job was ended after step 10: it goes on with the next batch, and with the random numbers of each rank."""
    assert plain(base, "data", "+recovery=data").ranks == mapped.ranks
    resumed = plain(base, "resumed", "+recovery=data", f"ckpt_path={base}/data/checkpoints/step10.ckpt")
    assert tcpstore(resumed) == {"False"}
    for rank, record in resumed.ranks.items():
        assert record["params"] == mapped.ranks[rank]["params"]
        for kind in ("batches", "losses"):
            assert list(record[kind].items())[10:] == list(mapped.ranks[rank][kind].items())[10:]


@pytest.mark.parametrize("tier", ["in_process", "gemini"])
def test_a_rank_dies_and_another_raises(base: Path, mapped: Result, tier: str) -> None:
    result = gemini(base, tier, f"+recovery={tier}", faults=f"{KILL},{RAISE}")
    assert result.exit_status == 0 and result.injected == 2 and len(result.recoveries) == 2, result.output[-4000:]
    assert ("no snapshots in memory" in result.output) == (tier == "in_process")
    assert result.ranks == mapped.ranks
    assert {rank: len(pids) for rank, pids in result.pids().items()} == {0: 1, 1: 2}, "a healthy process is kept"
    assert [event["repeated_steps"] for event in result.recoveries] == [0, 0]
    loaders = [event for event in result.agent_events if event["event"] == "loader_started"]
    assert len(loaders) == 2 * WORLD, "one per rank and epoch: the killed rank's own was kept"


def test_all_die_while_they_write(base: Path, mapped: Result) -> None:
    """The last tier has the step in memory; the one before has nothing to go back to without `persistent.url`."""
    result = gemini(base, "writing", "+recovery=gemini", faults=ALL_WRITING)
    assert result.exit_status == 0 and result.injected == WORLD and result.ranks == mapped.ranks, result.output[-4000:]
    result = gemini(base, "writing in process", "+recovery=in_process", faults=ALL_WRITING)
    assert result.exit_status == 1 and "nothing to go back to" in result.output and result.injected == WORLD
