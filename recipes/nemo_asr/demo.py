"""A QuartzNet is trained with a kill and an exception, and without, and the two are compared: ``make demo-nemo``.

Both runs are the same script with the same data; the undisturbed one is under Lightning's own ``ddp``, the other has one option more. Exit
status 0 only if both end, both faults were injected, no step was repeated, and weights, optimizer state, losses and WER are equal.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import requirements  # noqa: F401  isort: skip  first: says what is missing
import compare
import prepare

from lightning_gemini.telemetry import report

RECIPE = Path(__file__).resolve().parent
KILL_STEP, RAISE_STEP = 40, 50
FAULTS = f"[{{kind:kill,rank:1,step:{KILL_STEP},where:backward}},{{kind:raise,rank:0,step:{RAISE_STEP},where:forward}}]"


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description="Kill a rank of a NeMo training, make another raise, compare with an undisturbed run.")
    parser.add_argument("--model", choices=["quartznet", "conformer_ctc"], default="quartznet")
    parser.add_argument("--steps", type=int, default=60, help=f"training steps, {RAISE_STEP + 2} or more (default 60)")
    parser.add_argument("--out", type=Path, default=None, help="folder for the runs (default: a temporary one)")
    parser.add_argument("overrides", nargs="*", help="overrides of the recipe, as data.manifest=my.json")
    return parser


def main() -> int:
    """Exit status."""
    options = parser().parse_args()
    if options.steps < RAISE_STEP + 2:
        print(f"demo.py: --steps={options.steps} ends before the second fault: give {RAISE_STEP + 2} or more", file=sys.stderr)
        return 2
    out = (options.out or Path(tempfile.mkdtemp(prefix="nemo-demo-"))).resolve()
    try:
        train, validation = prepare.prepare(prepare.SOUNDS, out / "data")
    except (ValueError, OSError) as error:
        print(f"demo.py: {error}", file=sys.stderr)
        return 2
    print(f"1. {train} recordings to train with, {validation} to validate with; output in {out}", flush=True)
    common = [f"data.manifest={out}/data/train.json", f"data.validation={out}/data/validation.json", f"trainer.max_steps={options.steps}"]
    common += ["exp_manager.resume_if_exists=true", "exp_manager.resume_ignore_no_checkpoint=true", *options.overrides]
    print(f"2. {options.steps} steps of {options.model} on two ranks, under Lightning's own ddp: undisturbed", flush=True)
    if not _run(out / "undisturbed", options.model, common):
        return 1
    print(f"3. The same with +strategy=gemini: rank 1 gets SIGKILL in step {KILL_STEP}, rank 0 raises in step {RAISE_STEP}", flush=True)
    if not _run(out / "faulted", options.model, [*common, "+strategy=gemini", f"trainer.strategy.faults={FAULTS}"]):
        return 1
    return _verdict(out / "undisturbed" / options.model, out / "faulted" / options.model)


def _run(folder: Path, model: str, overrides: list[str]) -> bool:
    """NeMo has a lot to say: it goes to a file."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(RECIPE / "speech_to_text_ctc.py"), "--config-name", model, f"exp_manager.exp_dir={folder}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    started = time.monotonic()
    with open(folder / "output.txt", "wb") as output:
        status = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
    print(f"   ended with exit status {status} after {time.monotonic() - started:.1f} s", flush=True)
    if status:
        print("\n".join((folder / "output.txt").read_text().splitlines()[-30:]))
    return status == 0


def _verdict(undisturbed: Path, faulted: Path) -> int:
    summary = report.summarize(str(faulted / "gemini"))
    plain, ours = compare.read(undisturbed), compare.read(faulted)
    checks = {
        "two faults were injected": summary.injected == 2,
        "two recoveries": len(summary.recoveries) == 2,
        "no completed step was repeated": summary.repeated_steps == 0,
        **{f"equal: {name}": equal for name, equal in compare.verdict(plain, ours).items()},
    }
    print("\n4. Verdict\n" + report.text(summary))
    print(f"   {'':24} {'undisturbed':>12} {'with faults':>12}")
    for tag in ("train_loss", "val_loss", "val_wer"):
        print(f"   {tag + ' at the end':24} {plain.value(tag):12.6f} {ours.value(tag):12.6f}")
    for name, passed in checks.items():
        print(f"   {'yes' if passed else 'NO ':3}  {name}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
