"""What a persistent checkpoint costs the training: ours beside it, against `torch.distributed.checkpoint`, synchronous and asynchronous.

The same FSDP2 training on two nodes, checkpoints of all of its state at the same steps to the same disk. A rank is blocked while the call
that begins (or makes) a checkpoint has not returned; what a checkpoint takes from the steps beside it is told apart.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from benchmarks.common import MIB, Check, Report, main, number, progress
from benchmarks.nodes_job import Mark, Recipe, our_strategy, plain_strategy, script
from benchmarks.nodes_site import Site, marks, site, sizes
from lightning_gemini import GeminiFSDP2Strategy
from tests.support.plain import run_plain

_WARM_UP = 2
_STATE = 12
"""Bytes of state per parameter."""
_LIMIT_S = 300.0
_BLOCKED = 0.1
OURS, ASYNC, SYNC = "ours", "dcp.async_save", "dcp.save"


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured."""

    mib: int
    """State of a rank."""
    width: int
    batch: int
    every: int
    count: int

    @property
    def recipe(self) -> Recipe:
        """The training; the last checkpoint has time to be completed before the end."""
        depth = max(1, round(self.mib * MIB * 2 / _STATE / self.width**2))
        return Recipe("fsdp", 2, 1, self.width, depth, self.batch, steps=self.every * (self.count + 1) - 1)

    @property
    def due(self) -> list[int]:
        """Steps whose state is persisted."""
        return [self.every * (number + 1) for number in range(self.count)]


_FULL = Size(mib=256, width=2048, batch=64, every=8, count=3)
_QUICK = Size(mib=32, width=1024, batch=16, every=5, count=2)


@dataclass(slots=True)
class Arm:
    """What checkpoints took on one side."""

    blocked: list[float] = field(default_factory=list)
    """Seconds in the call, by rank and checkpoint."""
    committed: list[float] = field(default_factory=list)
    """Seconds from the call until the checkpoint was complete."""
    slowed: list[float] = field(default_factory=list)
    """Seconds by which the steps from the call to the completion were longer than others."""
    step_s: float = 0.0
    """A step beside no checkpoint."""

    def take(self, directory: Path, due: list[int], complete_ns: dict[int, int]) -> None:
        """From the notes and marks of a job."""
        steps = [mark for mark in marks(directory, 0) if mark.step > _WARM_UP]
        pairs = list(zip(steps, steps[1:], strict=False))
        began = {step: max(_notes(directory, rank)[step][0] for rank in range(2)) for step in due}
        spans = [(began[step], complete_ns[step]) for step in due]
        self.step_s = statistics.median(_seconds(a, b) for a, b in pairs if not any(_beside(a, b, span) for span in spans))
        for step, span in zip(due, spans, strict=True):
            self.blocked += [_notes(directory, rank)[step][1] for rank in range(2)]
            self.committed.append((span[1] - span[0]) / 1e9)
            self.slowed.append(sum(_seconds(a, b) - self.step_s for a, b in pairs if _beside(a, b, span)))


def _seconds(a: Mark, b: Mark) -> float:
    return (b.done_ns - a.done_ns) / 1e9


def _beside(a: Mark, b: Mark, span: tuple[int, int]) -> bool:
    """Whether a step, from the end of the one before to its own, has a part in common with a checkpoint."""
    return a.done_ns < span[1] and b.done_ns > span[0]


def _note(directory: Path, rank: int, step: int, began_ns: int) -> None:
    with (directory / f"blocked-rank{rank}.jsonl").open("a") as file:
        file.write(json.dumps([step, began_ns, (time.monotonic_ns() - began_ns) / 1e9]) + "\n")


def _notes(directory: Path, rank: int) -> dict[int, tuple[int, float]]:
    """Step -> when the call began (monotonic ns), and for how long it blocked."""
    lines = (directory / f"blocked-rank{rank}.jsonl").read_text().splitlines()
    return {step: (began, seconds) for step, began, seconds in map(json.loads, lines)}


class Timed(GeminiFSDP2Strategy):
    """Ours; notes how long `persist` takes."""

    def persist(self, trainer: pl.Trainer) -> None:
        began = time.monotonic_ns()
        super().persist(trainer)
        _note(Path(trainer.default_root_dir), trainer.global_rank, trainer.global_step, began)


def _timed(recipe: Recipe, directory: Path) -> Any:
    options = our_strategy(recipe, directory).config
    return Timed(data_parallel_size=recipe.world, tensor_parallel_size=1, persistent=options.persistent, telemetry=options.telemetry)


class Saver(pl.Callback):
    """`torch.distributed.checkpoint` at the steps in `due`; an asynchronous one waits for its predecessor, as its manual asks for."""

    def __init__(self, store: Path, due: list[int], *, later: bool) -> None:
        self.store, self.due, self.later = store, due, later
        self.future: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.group = dist.new_group(backend="gloo")  # its collectives must not be mixed up with those of the training

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        step, directory = trainer.global_step, Path(trainer.default_root_dir)
        if step not in self.due:
            return
        began = time.monotonic_ns()
        self.wait()
        model, optimizer = get_state_dict(pl_module, [getattr(each, "optimizer", each) for each in trainer.optimizers])
        write: Any = async_save if self.later else save
        self.future = write({"model": model, "optimizer": optimizer}, checkpoint_id=str(self.store / str(step)), process_group=self.group)
        _note(directory, trainer.global_rank, step, began)
        done = directory / f"complete-{step}-{trainer.global_rank}"
        if self.later:
            self.future.add_done_callback(lambda _: done.write_text(str(time.monotonic_ns())))
        else:
            done.write_text(str(time.monotonic_ns()))

    def wait(self) -> None:
        """For the checkpoint under way."""
        if self.later and self.future is not None:
            self.future.result()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.wait()


def _ours(place: Site, size: Size) -> tuple[Arm, float]:
    """Also bytes of a checkpoint."""
    persistent = {"url": str(place.directory / "store-ours"), "every_n_steps": size.every, "keep_last": size.count}
    job = place.run(replace(size.recipe, options={"persistent": persistent}), strategy=_timed)
    complete = {event["step"]: event["monotonic_ns"] for event in job.named("checkpoint")}
    if missing := [step for step in size.due if step not in complete]:
        raise RuntimeError(f"steps {missing} were not persisted:\n{job.named('persist_failed')}\n{job.outputs()}")
    arm = Arm()
    arm.take(job.directory, size.due, complete)
    return arm, sum(sizes(job.directory, rank)["owned"] for rank in range(2))


def _theirs(place: Site, size: Size, *, later: bool) -> Arm:
    directory = place.directory / f"job-{uuid.uuid4().hex[:8]}"
    saver = Saver(place.directory / f"store-{directory.name}", size.due, later=later)
    result = run_plain(directory, script(directory, size.recipe, saver, strategy=plain_strategy), size.recipe.world, _LIMIT_S)
    if result.exit_status:
        raise RuntimeError(f"the job ended with status {result.exit_status}:\n{result.output[-3000:]}")
    complete = {step: max(int((directory / f"complete-{step}-{rank}").read_text()) for rank in range(2)) for step in size.due}
    arm = Arm()
    arm.take(directory, size.due, complete)
    return arm


def measure(quick: bool) -> Report:
    """Run it."""
    report, size = Report("nodes-storage", "What a persistent checkpoint costs the training", quick), _QUICK if quick else _FULL
    with tempfile.TemporaryDirectory(prefix="gemini-bench-") as name, site(Path(name)) as place:
        progress(OURS)
        mine, total = _ours(place, size)
        arms = {OURS: mine}
        for later in (True, False):
            progress(ASYNC if later else SYNC)
            arms[ASYNC if later else SYNC] = _theirs(place, size, later=later)
    report.spreads("Seconds blocked in the call, by rank and checkpoint", {what: arm.blocked for what, arm in arms.items()})
    report.spreads("Seconds from the call until the checkpoint is complete", {what: arm.committed for what, arm in arms.items()})
    report.spreads("Seconds lost by the steps beside a checkpoint, the call included", {what: arm.slowed for what, arm in arms.items()})
    rows = [[what, number(arm.step_s), number(total / 1e6 / statistics.median(arm.committed))] for what, arm in arms.items()]
    report.table(f"A step beside no checkpoint, and throughput to the disk ({total / 1e6:.0f} MB)", ["", "s/step", "MB/s"], rows)
    middle = {what: statistics.median(arm.blocked) for what, arm in arms.items()}
    report.check(Check(f"blocked, ours / {ASYNC}", middle[OURS] / middle[ASYNC], _BLOCKED))
    report.check(Check(f"blocked, ours / {SYNC}", middle[OURS] / middle[SYNC], _BLOCKED))
    report.say(
        f"An MLP of {size.recipe.depth} layers of {size.width}, AdamW, {size.mib} MiB of state per rank, two ranks, one thread each, "
        f"{size.count} checkpoints at every {size.every}th step, to a local disk. Ours reads the snapshot that is in the agent's memory "
        "anyway; while it is being copied, snapshots of further steps are skipped. Only ours takes (and replicates) a snapshot of each "
        "step besides: compare its steps with the others' in `nodes_pace`, not here."
    )
    return report


if __name__ == "__main__":
    main(__doc__, measure)
