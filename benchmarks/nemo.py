"""From a fault to the next completed step in NeMo's speech recipe: ours against `exp_manager`'s resume from disk in a restarted job.

Both sides are the same script on the same recordings with two ranks. NeMo's own way saves a checkpoint in every step, so that it loses no
more than we do, and its job is started again the instant it has ended: what a scheduler would add is not counted.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import launch
from benchmarks.common import ROOT, Check, Report, Spread, main, progress

_RANKS, _FIRST, _APART = 2, 3, 3
_LIMIT_S = 400.0
_RATIO = 10.0
_WHAT = {"kill": "SIGKILL", "raise": "exception"}
_NEMO_S_OWN = (
    *("exp_manager.resume_if_exists=true", "exp_manager.resume_ignore_no_checkpoint=true"),
    *("exp_manager.checkpoint_callback_params.monitor=global_step", "exp_manager.checkpoint_callback_params.mode=max"),
    *("exp_manager.checkpoint_callback_params.save_top_k=1", "+exp_manager.checkpoint_callback_params.every_n_train_steps=1"),
    "+exp_manager.checkpoint_callback_params.every_n_epochs=null",
)


def struck(count: int) -> list[int]:
    """The steps in which the faults are."""
    return [_FIRST + _APART * i for i in range(count)]


def _command(directory: Path, manifests: Path, model: str, steps: int, *overrides: str) -> list[str]:
    data = [f"data.manifest={manifests}/train.json", f"data.validation={manifests}/validation.json", f"exp_manager.exp_dir={directory}/exp"]
    line = [sys.executable, str(ROOT / "benchmarks" / "nemo_job.py"), "--config-name", model, *data]
    return [*line, f"trainer.max_steps={steps}", "+trainer.limit_val_batches=0", *overrides]


def _tell(directory: Path, gates: Sequence[int] = (), kind: str = "kill", fault_steps: Sequence[int] = ()) -> None:
    told = {"directory": str(directory), "gates": list(gates), "kind": kind, "fault_steps": list(fault_steps)}
    os.environ["NEMO_BENCH"] = json.dumps(told)


def seconds(directory: Path, count: int) -> list[float]:
    """Of each fault, until both ranks have completed the step it struck."""
    found = []
    for step, fault_ns in sorted(launch.injected(directory).items()):
        done = [min(d.at_ns for d in launch.steps(directory, rank) if d.step > step and d.at_ns > fault_ns) for rank in range(_RANKS)]
        found.append((max(done) - fault_ns) / 1e9)
    if len(found) != count:
        raise RuntimeError(f"{count} faults were to be injected, {len(found)} were:\n{launch.tail(directory)}")
    return found


def ours(directory: Path, manifests: Path, model: str, kind: str, count: int) -> list[float]:
    """One job; each fault waits for a warm spare."""
    steps = struck(count)
    faults = ",".join(f"{{kind:{kind},rank:{i % _RANKS},step:{step},where:before_step}}" for i, step in enumerate(steps))
    gates = [step - 1 for step in steps]
    _tell(directory, gates)
    overrides = ["+strategy=gemini", f"trainer.strategy.faults=[{faults}]", f"trainer.strategy.telemetry.directory={directory}/gemini"]
    command = _command(directory, manifests, model, steps[-1] + 3, *overrides)
    deadline = time.monotonic() + _LIMIT_S
    with launch.running(directory, command) as process:
        while process.poll() is None:
            if gates and _at(directory, gates[0]) and launch.spare_ready(directory):
                (directory / f"go-{gates.pop(0)}").touch()
            if time.monotonic() > deadline:
                raise TimeoutError(f"the job hangs (gates still closed: {gates}):\n{launch.tail(directory)}")
            time.sleep(0.02)
        if process.returncode:
            raise RuntimeError(f"the job ended with status {process.returncode}:\n{launch.tail(directory)}")
    return seconds(directory, count)


def _at(directory: Path, step: int) -> bool:
    return all(any(done.step >= step for done in launch.steps(directory, rank)) for rank in range(_RANKS))


def restarts(directory: Path, manifests: Path, model: str, kind: str, count: int) -> list[float]:
    """The job is started again and again until it ends well."""
    steps = struck(count)
    _tell(directory, kind=kind, fault_steps=steps)
    command = _command(directory, manifests, model, steps[-1] + 3, *_NEMO_S_OWN)
    for _ in range(count + 1):
        with launch.running(directory, command) as process:
            try:
                process.wait(_LIMIT_S)
            except subprocess.TimeoutExpired:
                raise TimeoutError(f"NeMo's job hangs:\n{launch.tail(directory)}") from None
        if process.returncode == 0:
            return seconds(directory, count)
    raise RuntimeError(f"NeMo's job ended with status {process.returncode} although no fault was left:\n{launch.tail(directory)}")


def _one_kind(report: Report, base: Path, model: str, kind: str, count: int, restarted: int) -> None:
    progress(f"{model}: {count} x {_WHAT[kind]} under our strategy")
    mine = ours(base / f"{model}-{kind}", base / "data", model, kind, count)
    progress(f"{model}: {restarted} x {_WHAT[kind]}, exp_manager's resume in a restarted job")
    theirs = restarts(base / f"{model}-{kind}-nemo", base / "data", model, kind, restarted)
    report.spreads(f"{model}, {_WHAT[kind]}: seconds until both ranks have completed the step", {"ours": mine, "NeMo's own": theirs})
    events = launch.agent_events(base / f"{model}-{kind}", "recovered")
    phases = {name: [event["seconds"][name] for event in events] for name in events[0]["seconds"]}
    report.spreads(f"Ours, {model}, {_WHAT[kind]}: seconds by phase, from the agent's telemetry", phases)
    ratio = statistics.median(theirs) / Spread.of(mine).median
    report.check(Check(f"{model}, {_WHAT[kind]}: times faster than NeMo's own (medians)", ratio, _RATIO, at_least=True))


def _lines_for_us() -> int:
    """What a user would have to write."""
    recipe = ROOT / "recipes" / "nemo_asr"
    files = [recipe / "speech_to_text_ctc.py", *(recipe / "config").glob("*.yaml")]
    return sum("gemini" in line.lower() for file in files for line in file.read_text().splitlines())


def measure(quick: bool) -> Report:
    """Run it."""
    report = Report("nemo", "NeMo's speech recipe: from a fault to the next completed step", quick)
    count, restarted = (1, 1) if quick else (10, 3)
    with tempfile.TemporaryDirectory(prefix="gemini-bench-") as name:
        base = Path(name)
        prepare = [sys.executable, str(ROOT / "recipes" / "nemo_asr" / "prepare.py"), "--out", str(base / "data")]
        subprocess.run(prepare, check=True, timeout=60)
        for model in ["quartznet"] if quick else ["quartznet", "conformer_ctc"]:
            for kind in ("kill", "raise"):
                _one_kind(report, base, model, kind, count, restarted)
    report.check(Check("lines of the recipe's script and YAML that name us, who are one option: +strategy=gemini", _lines_for_us(), 0))
    report.say(
        "Two ranks on one machine, one thread each, gloo; a fault strikes one rank before it begins a step, the ranks in turn; time runs "
        "from the fault's own timestamp until both ranks have completed that step. Ours: one warm spare was ready. NeMo's own: a "
        "checkpoint to local disk in every step, `resume_if_exists`, and a new job the instant the old one has ended."
    )
    return report


if __name__ == "__main__":
    main(__doc__, measure)
