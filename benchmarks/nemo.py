"""From a fault to the next completed step in NeMo's speech recipe: ours against `exp_manager`'s resume from disk in a restarted job."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import ROOT, Check, Report, main
from benchmarks.recipes import Recipe, compare, lines_for_us

_NEMO_S_OWN = (
    *("exp_manager.resume_if_exists=true", "exp_manager.resume_ignore_no_checkpoint=true"),
    *("exp_manager.checkpoint_callback_params.monitor=global_step", "exp_manager.checkpoint_callback_params.mode=max"),
    *("exp_manager.checkpoint_callback_params.save_top_k=1", "+exp_manager.checkpoint_callback_params.every_n_train_steps=1"),
    "+exp_manager.checkpoint_callback_params.every_n_epochs=null",
)


def _recipe(model: str, manifests: Path) -> Recipe:
    data = (f"data.manifest={manifests}/train.json", f"data.validation={manifests}/validation.json")
    options = ("--config-name", model, *data, "exp_manager.exp_dir={directory}/exp", "+trainer.limit_val_batches=0")
    return Recipe(model, "recipes/nemo_asr/speech_to_text_ctc.py", options, ("+strategy=gemini",), _NEMO_S_OWN)


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
                compare(report, base, _recipe(model, base / "data"), kind, count, restarted, "NeMo's own")
    lines = lines_for_us("recipes/nemo_asr", "speech_to_text_ctc.py", "config/*.yaml")
    report.check(Check("lines of the recipe's script and YAML that name us, who are one option: +strategy=gemini", lines, 0))
    report.say(
        "Two ranks on one machine, one thread each, gloo; a fault strikes one rank before it begins a step, the ranks in turn; time runs "
        "from the fault's own timestamp until both ranks have completed that step. Ours: one warm spare was ready. NeMo's own: a "
        "checkpoint to local disk in every step, `resume_if_exists`, and a new job the instant the old one has ended."
    )
    return report


if __name__ == "__main__":
    main(__doc__, measure)
