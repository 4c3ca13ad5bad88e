"""What replication costs a step: the same training on two nodes under Lightning's own strategies, which meet in a TCPStore, and under ours.

Pairs of jobs in turn, one rank per node. Every step is captured and sent to the other node. Then a model of next to nothing, where all that
is left is what ranks and agents tell each other: on one node through shared memory, on two over the network.
"""

from __future__ import annotations

import statistics
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.common import Check, Report, main, progress
from benchmarks.nodes_job import Recipe, plain_strategy, script
from benchmarks.nodes_site import Site, marks, site, sizes
from tests.support.jobs import Result, run_job
from tests.support.plain import run_plain

_WARM_UP = 2
_RATIO = 1.05
_VOTE_MS = 5.0
_LIMIT_S = 200.0
_LABELS = {"ddp": "DDP", "fsdp": "FSDP2"}
_WAIT = {"replication": {"when_behind": "wait"}}


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured."""

    width: int
    depth: int
    batch: int
    steps: int
    pairs: int
    tiny: int
    """Steps of the model of next to nothing."""


_FULL = Size(width=1024, depth=12, batch=128, steps=12, pairs=3, tiny=150)
_QUICK = Size(width=512, depth=4, batch=64, steps=5, pairs=1, tiny=30)


@dataclass(slots=True)
class Arm:
    """What the jobs of one side took."""

    seconds: list[float] = field(default_factory=list)
    """Of each step of rank 0."""
    medians: list[float] = field(default_factory=list)
    """Of each job."""
    cpu: list[float] = field(default_factory=list)
    """CPU seconds per step of all ranks and agents, one value for each job."""

    def take(self, directory: Path, recipe: Recipe) -> None:
        """Add a job."""
        ranks = [[mark for mark in marks(directory, rank) if mark.step > _WARM_UP] for rank in range(recipe.world)]
        steps = [(b.done_ns - a.done_ns) / 1e9 for a, b in zip(ranks[0], ranks[0][1:], strict=False)]
        self.seconds += steps
        self.medians.append(statistics.median(steps))
        first, last = [own[0] for own in ranks], [own[-1] for own in ranks]
        spent = [b.done_cpu_s + b.agent_cpu_s - a.done_cpu_s - a.agent_cpu_s for a, b in zip(first, last, strict=True)]
        if recipe.per_node > 1:  # its one agent was counted with every rank
            spent = [value - (b.agent_cpu_s - a.agent_cpu_s) / 2 for value, a, b in zip(spent, first, last, strict=True)]
        self.cpu.append(sum(spent) / (len(ranks[0]) - 1))


def _plain(place: Site, recipe: Recipe) -> Path:
    """Under Lightning's own strategy."""
    return _alone(place, recipe, lambda path: run_plain(path, script(path, recipe, strategy=plain_strategy), recipe.world, _LIMIT_S))


def _one_node(place: Site, recipe: Recipe) -> Path:
    """Under ours, all ranks on one node."""
    recipe = replace(recipe, nodes=1, per_node=recipe.world)
    return _alone(place, recipe, lambda path: run_job(path, script(path, recipe), recipe.world, _LIMIT_S))


def _alone(place: Site, recipe: Recipe, run: Callable[[Path], Result]) -> Path:
    result = run(place.directory / f"job-{uuid.uuid4().hex[:8]}")
    if result.exit_status:
        raise RuntimeError(f"{recipe} ended with status {result.exit_status}:\n{result.output[-3000:]}")
    return result.directory


def _ours(place: Site, recipe: Recipe) -> Path:
    """Under ours."""
    return place.run(recipe).directory


def _pairs(place: Site, kind: str, size: Size, report: Report) -> None:
    base = Recipe(kind, 2, 1, size.width, size.depth, size.batch, _WARM_UP + 1 + size.steps)
    recipes = {"Lightning's own": base, "ours": base, "ours, `when_behind: wait`": replace(base, options=_WAIT)}
    arms, kept = {name: Arm() for name in recipes}, 0
    for turn in range(size.pairs):
        for name, recipe in list(recipes.items())[:: 1 if turn % 2 == 0 else -1]:
            progress(f"{_LABELS[kind]}, {name}, {turn + 1} of {size.pairs}")
            directory = _plain(place, recipe) if name == "Lightning's own" else _ours(place, recipe)
            arms[name].take(directory, recipe)
            kept = kept if name == "Lightning's own" else sum(sizes(directory, rank)["travelling"] for rank in range(2))
    _tell(report, _LABELS[kind], arms, kept)


def _tell(report: Report, label: str, arms: dict[str, Arm], kept: int) -> None:
    bare = arms["Lightning's own"]
    report.spreads(f"{label}: seconds per step ({kept / 1e6:.0f} MB to other nodes)", {name: arm.seconds for name, arm in arms.items()})
    report.spreads(f"{label}: CPU seconds per step, ranks and agents, one value per job", {name: arm.cpu for name, arm in arms.items()})
    ours = {name: arm for name, arm in arms.items() if arm is not bare}
    ratios = {name: [b / a for a, b in zip(bare.medians, arm.medians, strict=True)] for name, arm in ours.items()}
    report.spreads(f"{label}: ratio to Lightning's own, of the medians of each pair of jobs", ratios)
    for name, arm in ours.items():
        ratio = statistics.median(arm.seconds) / statistics.median(bare.seconds)
        report.check(Check(f"{label}: step time, {name} / Lightning's own", ratio, _RATIO))


def _tiny(place: Site, size: Size, report: Report) -> None:
    recipe = Recipe("ddp", 2, 1, width=16, depth=1, batch=2, steps=_WARM_UP + 1 + size.tiny)
    arms = {"Lightning's own": Arm(), "ours, one node": Arm(), "ours, two nodes": Arm()}
    for turn in range(size.pairs):
        progress(f"a tiny model, {turn + 1} of {size.pairs}")
        for (name, arm), run in zip(arms.items(), (_plain, _one_node, _ours), strict=True):
            taken = replace(recipe, nodes=1, per_node=recipe.world) if name == "ours, one node" else recipe
            arm.take(run(place, recipe), taken)
    report.spreads("A tiny model: milliseconds per step", {name: [1e3 * second for second in arm.seconds] for name, arm in arms.items()})
    middle = {name: 1e3 * statistics.median(arm.seconds) for name, arm in arms.items()}
    votes = middle["ours, two nodes"] - middle["ours, one node"]
    report.check(Check("votes over the network, per step: two nodes - one node", votes, _VOTE_MS, unit=" ms"))


def measure(quick: bool) -> Report:
    """Run it."""
    report, size = Report("nodes-pace", "What replication costs a step", quick), _QUICK if quick else _FULL
    with tempfile.TemporaryDirectory(prefix="gemini-bench-") as name, site(Path(name)) as place:
        for kind in _LABELS:
            _pairs(place, kind, size, report)
        _tiny(place, size, report)
    report.say(
        f"An MLP of {size.depth} layers of {size.width}, AdamW, {size.batch} samples per rank, gloo over loopback, one thread per rank. "
        "Where ranks keep all cores busy, as here, every CPU second of capturing, sending and verifying is taken from the training: "
        "compare with the CPU seconds. By default a step whose predecessor is not replicated yet takes no snapshot; with `wait` it waits."
    )
    return report


if __name__ == "__main__":
    main(__doc__, measure)
