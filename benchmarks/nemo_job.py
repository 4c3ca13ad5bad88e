"""The recipe's NeMo script as it is, with a clock beside it, and for NeMo's own way a fault: what to do comes as JSON in `NEMO_BENCH`."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "nemo_asr"
sys.path[:1] = [str(RECIPE), str(ROOT)]  # not this folder, whose nemo.py is another one


def watched() -> None:
    """Every Trainer of this process gets our clock, and the gates."""
    import lightning.pytorch as pl

    from benchmarks.job import Clock, Gate, Injector

    options = json.loads(os.environ["NEMO_BENCH"])
    directory = Path(options["directory"])

    class Fault(pl.Callback):
        """What our strategy's faults do; before the step, where it is dearest to nobody."""

        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            Injector(directory, options["kind"], options["fault_steps"], 2)(trainer.global_rank, trainer.global_step)

    original = pl.Trainer.fit

    @functools.wraps(original)
    def fit(self: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self.callbacks += [Gate(directory, options["gates"]), Fault(), Clock(directory)]  # type: ignore[attr-defined]
        original(self, *args, **kwargs)

    pl.Trainer.fit = fit  # type: ignore[method-assign]


if __name__ == "__main__":
    watched()
    script = RECIPE / "speech_to_text_ctc.py"  # not by runpy, which changes sys.argv: Lightning's ddp starts its other ranks by it
    exec(compile(script.read_text(), str(script), "exec"))
