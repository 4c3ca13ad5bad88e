"""`lightning-gemini demo`: a small GPT is trained with faults and without, and the two are compared bit by bit.

The faulted run is the recipe with `+strategy=gemini` and two injected faults; the undisturbed one is the same recipe under Lightning's own
`ddp`, in which nothing of ours runs. Exit status 0 only if both end, both faults were really injected, no completed step was repeated,
the healthy ranks kept their processes, and parameters, optimizer state and every loss are equal.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lightning_gemini.telemetry import report

KILLED, KILL_STEP = 2, 12
RAISED, RAISE_STEP = 1, 22


def parser() -> argparse.ArgumentParser:
    """The options of `demo`."""
    parser = argparse.ArgumentParser(
        prog="lightning-gemini demo", description="Kill a rank, make another raise, compare with an undisturbed run."
    )
    parser.add_argument("--steps", type=int, default=60, help="training steps (default 60)")
    parser.add_argument("--out", default=None, help="folder for the runs (default: a temporary one)")
    parser.add_argument("overrides", nargs="*", help="overrides of the recipe, as data.path=my.txt")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; 0 when everything is as promised."""
    options = parser().parse_args(arguments)
    recipe = Path(__file__).resolve().parent.parent / "recipes" / "gpt" / "train.py"
    if not recipe.exists():
        print("lightning-gemini demo: the recipes are not part of the installed package: run it in a clone of the project", file=sys.stderr)
        return 2
    if options.steps <= RAISE_STEP + 1:
        print(
            f"lightning-gemini demo: --steps={options.steps} ends before the second fault: give {RAISE_STEP + 2} or more", file=sys.stderr
        )
        return 2
    out = Path(options.out or tempfile.mkdtemp(prefix="lightning-gemini-demo-"))
    common = [f"trainer.max_steps={options.steps}", "trainer.val_check_interval=20", *options.overrides]
    print(f"1. {options.steps} steps on 4 ranks; rank {KILLED} gets SIGKILL in step {KILL_STEP}, rank {RAISED} raises in backward of step "
          f"{RAISE_STEP}; output in {out}", flush=True)  # fmt: skip
    faulted = out / "faulted"
    faults = f"[{{kind:kill,rank:{KILLED},step:{KILL_STEP},where:forward}},{{kind:raise,rank:{RAISED},step:{RAISE_STEP},where:backward}}]"
    gemini = ["+strategy=gemini", f"trainer.strategy.faults={faults}", f"trainer.strategy.telemetry.directory={faulted}/gemini"]
    if not _run(recipe, faulted, [*common, *gemini]):
        return 1
    print("\n2. The same work undisturbed, under Lightning's own ddp.", flush=True)
    if not _run(recipe, out / "undisturbed", common):
        return 1
    return _verdict(out, options.steps)


def _run(recipe: Path, directory: Path, overrides: list[str]) -> bool:
    started = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(recipe), f"hydra.run.dir={directory}", *overrides]
    status = subprocess.run(command, env=environment, check=False).returncode
    print(f"   ended with exit status {status} after {time.monotonic() - started:.1f} s", flush=True)
    return status == 0


def _records(directory: Path) -> dict[int, dict[str, Any]]:
    return {int(path.stem.removeprefix("rank")): json.loads(path.read_text()) for path in (directory / "recorder").glob("rank*.json")}


def _verdict(out: Path, steps: int) -> int:
    summary = report.summarize(str(out / "faulted" / "gemini"))
    ours, plain = _records(out / "faulted"), _records(out / "undisturbed")
    healthy = [rank for rank in summary.pids if rank != KILLED]
    kept = {rank: len(summary.pids[rank]) == 1 and ours.get(rank, {}).get("pid") == summary.pids[rank][0] for rank in healthy}
    losses = {
        step
        for rank in plain
        for step in plain[rank]["losses"]
        if ours.get(rank, {}).get("losses", {}).get(step) == plain[rank]["losses"][step]
    }
    recorded = {step for rank in plain for step in plain[rank]["losses"]}
    checks = {
        "two faults were injected": summary.injected == 2,
        "two recoveries": len(summary.recoveries) == 2,
        "no completed step was repeated": summary.repeated_steps == 0,
        f"all {steps} steps were made": len(plain) == 4 and all(record["steps"] == steps for record in [*ours.values(), *plain.values()]),
        "healthy ranks kept their processes": len(kept) == 3 and all(kept.values()),
        "final parameters are bit-identical": _equal(ours, plain, "params"),
        "final optimizer state is bit-identical": _equal(ours, plain, "optimizer"),
        f"the loss of every step is bit-identical ({len(losses)} of {len(recorded)} steps)": _equal(ours, plain, "losses"),
    }
    print("\n3. Verdict\n" + report.text(summary))
    for rank, pids in sorted(summary.pids.items()):
        print(f"   rank {rank}: pid {' -> '.join(map(str, pids))}, at the end {ours.get(rank, {}).get('pid')}")
    for name, passed in checks.items():
        print(f"   {'yes' if passed else 'NO ':3}  {name}")
    return 0 if all(checks.values()) else 1


def _equal(ours: dict[int, dict[str, Any]], plain: dict[int, dict[str, Any]], key: str) -> bool:
    return len(plain) == 4 and ours.keys() == plain.keys() and all(ours[rank][key] == plain[rank][key] for rank in plain)
