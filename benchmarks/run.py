"""Runs every benchmark in a process of its own and sums up: what was measured, against its target.

The exit status says whether the scripts ran, not whether the targets were met: a figure that is missed is reported as it is.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import CHECK_HEADER, ROOT, Check, load, options, progress, table

SCRIPTS = (
    *("rendezvous", "reform", "recovery", "snapshot_cost", "endurance", "data", "replication"),
    *("llama", "nodes", "nodes_recovery", "nodes_bytes", "nodes_pace", "nodes_storage", "nodes_rival"),
    *(("nemo",) if importlib.util.find_spec("nemo") else ()),  # it has an environment of its own, .venv-nemo
)


def _run(script: str, quick: bool, output: Path | None, checks: Path) -> list[Check] | None:
    command = [sys.executable, "-m", f"benchmarks.{script}", "--checks", str(checks)]
    command += ["--quick"] if quick else []
    command += ["--output", str(output.resolve())] if output is not None else []
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        return None
    return [Check(**check) for check in json.loads(checks.read_text())]


def main() -> int:
    """Returns the exit status."""
    chosen = options(__doc__)
    print(f"Load: {load()}", flush=True)
    rows, failed, found = [], [], []
    with tempfile.TemporaryDirectory(prefix="gemini-bench-") as directory:
        for script in SCRIPTS:
            started = time.monotonic()
            checks = _run(script, chosen.quick, chosen.output, Path(directory) / f"{script}.json")
            progress(f"{script} {'failed' if checks is None else 'ended'} after {time.monotonic() - started:.0f} s")
            if checks is None:
                failed.append(script)
            rows += [[script, *check.cells()] for check in checks or []]
            found += checks or []
    print("\n" + table(["benchmark", *CHECK_HEADER], rows) if rows else "\nnothing was measured")
    print(f"\n{sum(check.met for check in found)} of {len(found)} targets met. Load: {load()}")
    if chosen.checks is not None:
        chosen.checks.write_text(json.dumps(rows))
    if failed:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
