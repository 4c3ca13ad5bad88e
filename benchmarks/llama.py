"""From a fault to the next completed step in the Llama recipe: ours against Lightning's own resume from disk in a restarted job."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.common import Report, main
from benchmarks.recipes import Recipe, compare

_LIGHTNING_S_OWN = (
    *("trainer.enable_checkpointing=true", "+callbacks.checkpoint._target_=lightning.pytorch.callbacks.ModelCheckpoint"),
    *("+callbacks.checkpoint.dirpath={directory}/checkpoints", "+callbacks.checkpoint.every_n_train_steps=1"),
    *("+callbacks.checkpoint.save_last=true", "ckpt_path=last"),
)
_FSDP2 = ("trainer.strategy={_target_:lightning.pytorch.strategies.ModelParallelStrategy,data_parallel_size:2,tensor_parallel_size:1}",)
_HSDP = ("trainer.strategy={_target_:lightning.pytorch.strategies.ModelParallelStrategy,data_parallel_size:4,tensor_parallel_size:1}",)
# name -> the recipe's own options, our strategy, what selects the same sharding without us, ranks
_KINDS: dict[str, tuple[tuple[str, ...], str, tuple[str, ...], int]] = {
    "ddp": ((), "gemini", (), 2),
    "fsdp2": ((), "gemini_fsdp2", _FSDP2, 2),
    "hsdp": (("trainer.devices=4", "model.replicate=2"), "gemini_fsdp2", _HSDP, 4),
    "lora": (("lora=r16",), "gemini", (), 2),
}


def _recipe(kind: str) -> Recipe:
    options, strategy, without, ranks = _KINDS[kind]
    common = ("hydra.run.dir={directory}/run", "data.cache_directory={directory}/cache", *options)
    return Recipe(f"llama-{kind}", "recipes/llama/train.py", common, (f"+strategy={strategy}",), (*without, *_LIGHTNING_S_OWN), ranks)


def measure(quick: bool) -> Report:
    """Run it."""
    report = Report("llama", "The Llama recipe: from a fault to the next completed step", quick)
    count, restarted = (1, 1) if quick else (10, 3)
    with tempfile.TemporaryDirectory(prefix="gemini-bench-") as name:
        for kind in ["ddp"] if quick else _KINDS:
            for fault in ("kill", "raise"):
                compare(report, Path(name), _recipe(kind), fault, count, restarted, "Lightning's own")
    report.say(
        "The tiny Llama; 2 ranks, HSDP 4, on one machine, one thread each, gloo; a fault strikes one rank before it begins a step, the "
        "ranks in turn; the script is the same on both sides and names our recovery nowhere; time runs from the fault's own timestamp "
        "until all ranks have completed that step. Ours: one warm spare was ready. Lightning's own: ModelCheckpoint to local disk in "
        "every step, `ckpt_path=last`, and a new job the instant the old one has ended."
    )
    return report


if __name__ == "__main__":
    main(__doc__, measure)
