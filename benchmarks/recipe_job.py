"""A recipe's script as it is, with a clock beside it, and for the framework's own way a fault: `RECIPE_BENCH` has what to do, as JSON."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = json.loads(os.environ["RECIPE_BENCH"])
SCRIPT = ROOT / OPTIONS["script"]
sys.path[:1] = [str(SCRIPT.parent), str(ROOT)]  # not this folder, whose nemo.py is another one


def watched() -> None:
    """Every Trainer of this process gets our clock, and the gates."""
    import lightning.pytorch as pl

    from benchmarks.job import Clock, Gate, Injector

    directory = Path(OPTIONS["directory"])

    class Fault(pl.Callback):
        """What our strategy's faults do; before the step, where it is dearest to nobody."""

        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            Injector(directory, OPTIONS["kind"], OPTIONS["fault_steps"], OPTIONS["ranks"])(trainer.global_rank, trainer.global_step)

    original = pl.Trainer.fit

    @functools.wraps(original)
    def fit(self: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self.callbacks += [Gate(directory, OPTIONS["gates"]), Fault(), Clock(directory)]  # type: ignore[attr-defined]
        original(self, *args, **kwargs)

    pl.Trainer.fit = fit  # type: ignore[method-assign]


if __name__ == "__main__":
    watched()
    # not by runpy, which changes sys.argv: Lightning's ddp starts its other ranks by it
    exec(compile(SCRIPT.read_text(), str(SCRIPT), "exec"))
