"""What a snapshot of every step costs: blocked time, CPU seconds, and the pace of a real job, each beside its baseline.

The parts (a) and (b) copy the same bytes with our snapshot and with libc's memcpy (see `snapshot_micro`). Part (c) trains the same model
with and without us in alternation, 4 ranks, started as users do; the batch size is chosen so that plain ddp takes about a second a step.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import launch, snapshot_micro
from benchmarks.common import MIB, Check, Report, main, progress
from benchmarks.snapshot_micro import Measured

_WARM_UP = 4
"""Steps before the ones that are timed; at their end a spare is ready, so that no interpreter starts beside the timed ones."""
_WIDTH = 2048
_STATE_PER_PARAMETER = 12  # float32 parameter and AdamW's two moments
_SMALL, _LARGE = 4, 64  # batch sizes of the calibration


@dataclass(slots=True)
class Arm:
    """The timed steps of all runs of one side."""

    runs: list[list[float]] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    """CPU seconds per step and rank."""

    @property
    def seconds(self) -> list[float]:
        """Of all runs."""
        return [second for run in self.runs for second in run]

    def take(self, directory: Path) -> None:
        """Add a run."""
        ranks = [[step for step in launch.steps(directory, rank) if step.step > _WARM_UP] for rank in range(launch.WORLD)]
        self.runs.append([(b.at_ns - a.at_ns) / 1e9 for a, b in zip(ranks[0], ranks[0][1:], strict=False)])
        self.cpu.append(statistics.mean((steps[-1].cpu_s - steps[0].cpu_s) / (len(steps) - 1) for steps in ranks))


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured."""

    micro: tuple[int, ...]
    """Bytes owned per rank in parts (a) and (b), in MiB."""
    rounds: int
    owned: int
    """Bytes owned per rank in part (c)."""
    pairs: int
    steps: int
    step_s: float | None
    """Wanted length of a step; None: the smaller batch of the calibration, as it is."""

    @property
    def depth(self) -> int:
        """Layers, for the wanted bytes."""
        return max(1, round(self.owned * launch.WORLD / _STATE_PER_PARAMETER / _WIDTH**2))


_FULL = Size(micro=(64, 256), rounds=15, owned=100_000_000, pairs=4, steps=14, step_s=1.0)
_QUICK = Size(micro=(64,), rounds=3, owned=26_000_000, pairs=1, steps=4, step_s=None)


def _micro(report: Report, size: int, ranks: int, rounds: int) -> None:
    progress(f"one snapshot of {size} MiB in each of {ranks} process(es)")
    found = snapshot_micro.measure(size * MIB, ranks, rounds)
    label = f"{size} MiB owned, {ranks} rank{'s' if ranks > 1 else ''}"
    report.spreads(f"(a), (b) {label}: milliseconds", {name: [1e3 * second for second in seconds] for name, seconds in found.items()})
    middle = {name: statistics.median(seconds) for name, seconds in found.items()}
    extra = middle["computing + snapshot"] - middle["computing"]
    report.table(
        f"(a), (b) {label}: ratios of the medians",
        ["", "ratio"],
        [
            ["drain() returns / memcpy", f"{middle['drain() returns'] / middle['memcpy']:.4f}"],
            ["copy inside the step / memcpy", f"{middle['snapshot in the step'] / middle['memcpy']:.3f}"],
            ["(computing + snapshot - computing) / memcpy", f"{extra / middle['memcpy']:.3f}"],
            ["CPU, copy inside the step / (memcpy + xxh3)", f"{middle['snapshot in the step, CPU'] / middle['memcpy + xxh3, CPU']:.3f}"],
        ],
    )
    report.check(Check(f"(a) blocked / memcpy, {label}", _blocked(found), 1.0))
    cpu = middle["snapshot in the background, CPU"] / middle["memcpy + xxh3, CPU"]
    report.check(Check(f"(b) CPU / (memcpy + xxh3), {label}", cpu, 1.3))


def _blocked(found: Measured) -> float:
    return statistics.median(found["drain() + settle() around computing"]) / statistics.median(found["memcpy"])


def _train(directory: Path, strategy: str, size: Size, batch: int, steps: int) -> None:
    start: Callable[..., list[str]] = launch.gemini if strategy == "gemini" else launch.torchrun
    model = ("--width", _WIDTH, "--depth", size.depth, "--batch", batch)
    command = start(directory, *model, "--steps", _WARM_UP + 1 + steps, "--gates", [_WARM_UP])
    launch.run(directory, command, 300.0, [_WARM_UP], lambda: strategy == "ddp" or launch.spare_ready(directory))


def _batch(base: Path, size: Size) -> int:
    """Samples per rank for a step of the wanted length under plain ddp: two runs and a straight line."""
    if size.step_s is None:
        return _SMALL
    progress("calibrating the step")
    seconds = []
    for batch in (_SMALL, _LARGE):
        arm = Arm()
        _train(base / f"calibration-{batch}", "ddp", size, batch, 6)
        arm.take(base / f"calibration-{batch}")
        seconds.append(statistics.median(arm.seconds))
    per_sample = (seconds[1] - seconds[0]) / (_LARGE - _SMALL)
    return max(1, round(_SMALL + (size.step_s - seconds[0]) / per_sample)) if per_sample > 0 else _LARGE


def _pace(report: Report, base: Path, size: Size) -> None:
    batch, arms = _batch(base, size), {"ddp": Arm(), "gemini": Arm()}
    for pair in range(size.pairs):
        for strategy in ("ddp", "gemini") if pair % 2 == 0 else ("gemini", "ddp"):
            progress(f"training with {strategy}, pair {pair + 1} of {size.pairs}")
            directory = base / f"{strategy}-{pair}"
            _train(directory, strategy, size, batch, size.steps)
            arms[strategy].take(directory)
    _report_pace(report, size, batch, arms)


def _report_pace(report: Report, size: Size, batch: int, arms: dict[str, Arm]) -> None:
    plain, ours = arms["ddp"], arms["gemini"]
    label = f"{size.owned / 1e6:.0f} MB owned per rank, {launch.WORLD} ranks"
    report.spreads(f"(c) {label}: seconds per step", {"plain ddp": plain.seconds, "with us": ours.seconds})
    report.spreads(f"(c) {label}: CPU seconds per step and rank, one value per run", {"plain ddp": plain.cpu, "with us": ours.cpu})
    pairs = [statistics.median(b) / statistics.median(a) for a, b in zip(plain.runs, ours.runs, strict=True)]
    extras = [b - a for a, b in zip(plain.cpu, ours.cpu, strict=True)]
    report.spreads(f"(b) {label}: extra CPU seconds per step and rank, one value per pair of runs", {"with us - plain ddp": extras})
    report.spreads("(c) ratio of the medians of each pair of runs", {"with us / plain ddp": pairs})
    found = snapshot_micro.measure(size.owned, launch.WORLD, 5)
    base_cpu = statistics.median(found["memcpy + xxh3, CPU"])
    extra = statistics.median(extras)
    report.say(
        f"(c) An MLP of {size.depth} layers of {_WIDTH}, AdamW, {batch} samples per rank and step, gloo's all-reduce of its gradients in "
        f"every step. The extra CPU seconds of the job hold all of our work, not only the copy, and are the small difference of two large "
        f"numbers; one memcpy and one xxh3 of the owned bytes take {base_cpu:.4f} s."
    )
    report.check(Check(f"(b) all extra CPU in the job / (memcpy + xxh3), {label}", extra / base_cpu, 1.3))
    report.check(Check(f"(c) step time / plain ddp, {label}", statistics.median(ours.seconds) / statistics.median(plain.seconds), 1.05))


def measure(quick: bool) -> Report:
    """Run it."""
    report, size = Report("snapshot-cost", "What a snapshot of every step costs", quick), _QUICK if quick else _FULL
    for owned in size.micro:
        for ranks in (1, launch.WORLD):
            _micro(report, owned, ranks, size.rounds)
    with tempfile.TemporaryDirectory(prefix="gemini-bench-") as name:
        _pace(report, Path(name), size)
    report.say(
        "memcpy is libc's, on one thread, into preallocated shared memory. A snapshot in the background is handed over by `drain()`, which "
        "returns at once; `settle()` is called before the optimizer writes and waits for what is left of it. Blocked is the time spent in "
        f"both calls around a computation {snapshot_micro.COMPUTE_FACTOR:g} times as long as a memcpy. Where more ranks than cores "
        "compute, the copy takes its CPU seconds from the computation instead; that share is in `computing + snapshot`."
    )
    return report


if __name__ == "__main__":
    main(__doc__, measure)
