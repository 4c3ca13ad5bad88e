"""What the benchmarks share: spreads, checks against a target, and the report that is printed and saved as a dated Markdown table."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import signal
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "benchmarks"
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Spread:
    """How a measured quantity is distributed."""

    n: int
    median: float
    p95: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of at least one value; p95 is the nearest rank, a value that was seen."""
        found = sorted(values)
        if not found:
            raise ValueError("nothing was measured")
        return cls(len(found), statistics.median(found), found[math.ceil(0.95 * len(found)) - 1], found[0], found[-1])


@dataclass(frozen=True, slots=True)
class Check:
    """One figure against its target."""

    name: str
    value: float
    target: float
    at_least: bool = False
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether the target is met."""
        return self.value >= self.target if self.at_least else self.value <= self.target

    def cells(self) -> list[str]:
        """Its row in a table of checks."""
        sign = ">=" if self.at_least else "<="
        return [self.name, f"{number(self.value)}{self.unit}", f"{sign} {number(self.target)}{self.unit}", "met" if self.met else "MISSED"]


CHECK_HEADER = ["figure", "measured", "target", ""]


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 9)}f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, padded so that it also reads well in a terminal."""
    lines = [list(header), *map(list, rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(header))]
    padded = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([padded[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *padded[1:]])


def load() -> str:
    """What else the machine is doing."""
    one, five, fifteen = os.getloadavg()
    return f"{one:.2f} (1 min), {five:.2f} (5 min), {fifteen:.2f} (15 min) on {os.cpu_count()} cores"


def machine() -> str:
    """Size and software of the machine; nothing that identifies it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "lightning_gemini"))
    software = f"{platform.system()}, Python {platform.python_version()}, {packages}"
    return f"{os.cpu_count()} cores ({platform.machine()}), {memory:.0f} GiB, {software}"


@dataclass(slots=True)
class Report:
    """Collects what one benchmark has found."""

    name: str
    title: str
    quick: bool
    checks: list[Check] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    load_before: str = field(default_factory=load)

    def say(self, text: str) -> None:
        """A paragraph."""
        self.parts.append(text)

    def table(self, title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table of its own."""
        self.parts.append(f"**{title}**\n\n{table(header, rows)}")

    def spreads(self, title: str, values: Mapping[str, Iterable[float]]) -> None:
        """One row of statistics for each named series."""
        rows = []
        for label, series in values.items():
            spread = Spread.of(series)
            rows.append([label, str(spread.n), *map(number, (spread.median, spread.p95, spread.minimum, spread.maximum))])
        self.table(title, ["", "n", "median", "p95", "min", "max"], rows)

    def check(self, check: Check) -> None:
        """Compare with a target."""
        self.checks.append(check)

    def markdown(self) -> str:
        """The whole report."""
        head = [f"# {self.title}", f"{datetime.date.today().isoformat()}. {machine()}."]
        head.append(f"Load before: {self.load_before}. Load after: {load()}.")
        if self.quick:
            head.append("A QUICK run: too few repetitions, figures not to be quoted.")
        if self.checks:
            head.append(table(CHECK_HEADER, [check.cells() for check in self.checks]))
        return "\n\n".join([*head, *self.parts]) + "\n"

    def finish(self, output: Path | None) -> None:
        """Print the report, and save it under its date."""
        text = self.markdown()
        print("\n" + text, flush=True)
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            (output / f"{datetime.date.today().isoformat()}-{self.name}.md").write_text(text)


def options(description: str | None) -> argparse.Namespace:
    """The command line of every benchmark."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few repetitions: shows that the scripts work; saved only with --output")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to save the table (default: docs/benchmarks; nowhere if --quick)")
    parser.add_argument("--checks", type=Path, metavar="FILE", help="also write the figures with a target as JSON")
    found = parser.parse_args()
    if found.output is None and not found.quick:
        found.output = RESULTS
    return found


def main(description: str | None, measure: Callable[[bool], Report]) -> None:
    """Run one benchmark as a program."""
    chosen = options(description)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as an exception, so that jobs are ended too
    report = measure(chosen.quick)
    report.finish(chosen.output)
    if chosen.checks is not None:
        chosen.checks.write_text(json.dumps([asdict(check) for check in report.checks]))


def progress(text: str) -> None:
    """Say what is going on."""
    print(f"benchmarks: {text}", flush=True)
