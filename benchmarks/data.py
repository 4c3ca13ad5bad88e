"""What mapped data buys and costs: the first batch of a replaced rank, batches per second, memory; each against plain DataLoaders.

The parts are in `data_first`, `data_throughput` and `data_memory`. The load of the machine matters: two loaders and a consumer compete for
its cores.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks import data_first as first
from benchmarks import data_memory as memory
from benchmarks import data_throughput as throughput
from benchmarks.common import MIB, Check, Report, Spread, main, number, progress

_FASTER, _THROUGHPUT = 20.0, 0.95


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured."""

    rounds: int
    batch: int
    """The batch that the killed rank has in hand."""
    sizes: tuple[int, ...]
    """Bytes of a batch."""
    times: int
    seconds: float
    memory: int


_FULL = Size(rounds=9, batch=200, sizes=(64 * 1024, MIB, 16 * MIB), times=5, seconds=0.3, memory=3)
_QUICK = Size(rounds=2, batch=20, sizes=(64 * 1024, MIB), times=2, seconds=0.1, memory=1)


def _first(report: Report, base: Path, size: Size) -> None:
    progress(f"{size.rounds} ranks are killed in the middle of an epoch")
    found = first.measure(base, size.batch, size.rounds)
    report.spreads("Milliseconds until the first batch", {side: [1e3 * second for second in found[side]] for side in found})
    rows = []
    for slow, fast in ((first.COLD, first.READY), (first.COLD, first.AGAIN), (first.ONLY_WORKERS, first.READY)):
        ratio = statistics.median(found[slow]) / statistics.median(found[fast])
        spread = Spread.of(a / b for a, b in zip(found[slow], found[fast], strict=True))
        rows.append([slow, fast, *map(number, (ratio, spread.minimum, spread.maximum))])
    report.table("Times faster: of the medians, and the least and the most of one round", ["", "against", "ratio", "min", "max"], rows)
    ratio = statistics.median(found[first.COLD]) / statistics.median(found[first.READY])
    report.check(Check("first batch: cold loader / replaced rank", ratio, _FASTER, at_least=True))
    report.say(
        f"{first.SAMPLES:,} lines of text, {'a BPE tokenizer' if (base / 'tokenizer.json').exists() else 'a table of words'} from a file, "
        f"an index that numpy makes of the text (a loop over the lines would take longer) and shuffles, batches of {first.BATCH}, "
        f"{first.WORKERS} workers. All sides get batch {size.batch} of the same epoch, the last that the killed rank had, with the same "
        "bits. Imports are on no side; the text is in the page cache. The cold loader skips through its sampler, without reading. A mapped "
        "loader stands around the script's own loader object: its data set belongs to the set-up of a rank, a warm spare's too, and is "
        "outside the first figure's clock; the row with it shows what building it again costs when nothing of it was done in advance."
    )


def _throughput(report: Report, base: Path, size: Size) -> None:
    tokenize, text, products = first.load_tokenizer(base), " ".join(first.lines()[:20]), throughput.products()
    rows, lowest = [], dict[str, float]()
    for workers, tokens, steps, batch in itertools.product((0, 2), (False, True), (True, False), size.sizes):
        progress(f"throughput: {workers} workers, {batch >> 10} KiB, {'tokens' if tokens else 'cheap'}, {'' if steps else 'no '}step")
        case = throughput.Case(workers, batch, tokens, products if steps else 0)
        pairs = throughput.measure(case, tokenize, text, size.times, size.seconds)
        bare, ours = (statistics.median(rates) for rates in zip(*pairs, strict=True))
        spread = Spread.of(b / a for a, b in pairs)
        named = [str(workers), "tokens" if tokens else "cheap", "yes" if steps else "no", f"{batch >> 10}"]
        rows.append([*named, *map(number, (bare, ours, ours / bare, spread.minimum, spread.maximum))])
        group = f"{workers} workers, {'tokens' if tokens else 'cheap'}, {'with a step' if steps else 'no step'}"
        lowest[group] = min(lowest.get(group, ours / bare), ours / bare)
    header = ["workers", "data", "step", "KiB", "bare", "mapped", "ratio", "min", "max"]
    report.table("Batches per second: medians, their ratio, and the least and the most of one pair", header, rows)
    for group, ratio in lowest.items():
        report.check(Check(f"throughput, mapped / bare, lowest of all sizes: {group}", ratio, _THROUGHPUT, at_least=True))
    report.say(
        f"{size.times} pairs per row, {size.seconds:g} s each, after {throughput.WARM_UP} batches that are not timed. `cheap`: a sample "
        f"is there already, collating copies it; `tokens`: besides, each of the {throughput.SAMPLES} samples of a batch tokenizes 240 "
        f"words. `step`: {products} matrix products, 2 ms on an idle core of this machine, and one byte of every page of the batch is "
        "read; without it, nothing is done between two batches. One thread each; with two workers there are four busy processes, the "
        f"mapped loader's own included, for {os.cpu_count()} cores."
    )


def _memory(report: Report, size: Size) -> None:
    sides = (memory.ONE, memory.MAPPED, memory.BARE)
    found: dict[str, list[memory.Taken]] = {side: [] for side in sides}
    for turn in range(size.memory):
        for side in sides[:: 1 if turn % 2 == 0 else -1]:
            progress(f"memory: {memory.RANKS} ranks, {side}")
            found[side].append(memory.measure(side))
    base = statistics.median(taken.total for taken in found[memory.BARE])
    rows = []
    for side in sides:
        totals = Spread.of(taken.total for taken in found[side])
        parts = [statistics.median(taken.own for taken in found[side]), statistics.median(taken.shared for taken in found[side])]
        figures = map(number, (totals.median, totals.minimum, totals.maximum, *parts, totals.median / base))
        rows.append([side, str(found[side][0].processes), *figures])
    header = ["", "processes", "MiB", "min", "max", "in PSS", "in shared memory", "ratio"]
    report.table(f"Memory that loading takes for {memory.RANKS} ranks (median of {size.memory})", header, rows)
    ratio = statistics.median(taken.total for taken in found[memory.ONE]) / base
    report.check(Check(f"memory: {memory.RANKS} ranks on one source / {memory.RANKS} bare loaders", ratio, 1.0))
    report.say(
        f"Batches of {memory.BATCH // MIB} MiB, {memory.WORKERS} workers per loader, {throughput.WINDOW} batches ahead of the mapped "
        "loaders and 2 behind, 2 per worker ahead of the bare ones. Each rank holds one batch. PSS here is without shared memory, which is "
        "counted once for all processes; what the ranks had before their loaders started is taken off. All are forked from one process "
        "and share its pages; ranks that were started apart share less, with the workers of the others least of all."
    )


def measure(quick: bool) -> Report:
    """Run it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # it would warn in every fork
    report, size = Report("data", "Mapped data against plain loaders", quick), _QUICK if quick else _FULL
    with tempfile.TemporaryDirectory(prefix="gemini-bench-") as name:
        base = Path(name)
        progress("writing the text")
        first.write(base)
        _first(report, base, size)
        _throughput(report, base, size)
    _memory(report, size)
    return report


if __name__ == "__main__":
    main(__doc__, measure)
