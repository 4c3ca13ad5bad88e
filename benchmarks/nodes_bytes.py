"""What a step sends to other nodes: ours against every rank sending its whole state to m - 1 peers, for DDP, FSDP2 and both HSDP.

Two nodes with two ranks each, in network namespaces: what their links carry is read from /proc/net/dev, from one step at whose beginning
everything is replicated to another. Each layout is trained twice, with `replication.copies` 2 and 1; the difference is what replication
sends. It is compared with what `state.ownership` says must travel.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl

from benchmarks.common import Check, Report, main, number, progress
from benchmarks.nodes_job import Recipe, wait_until_replicated
from benchmarks.nodes_site import NoNamespaces, Site, site, sizes
from tests.support.nodes import Nodes

_KINDS = {"ddp": "DDP", "fsdp": "FSDP2", "across": "HSDP, replicas on other nodes", "within": "HSDP, replicas on the own node"}
_COPIES = 2
_CLOSE = 1.05
_FEW = 0.01
"""Below this part of the naive bytes a ratio would be one of headers."""
_MB = 1e6


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured."""

    width: int
    depth: int
    first: int
    """Counting begins before this step."""
    steps: int
    """That are counted."""


_FULL = Size(width=768, depth=8, first=3, steps=10)
_QUICK = Size(width=384, depth=4, first=2, steps=4)


class Wire(pl.Callback):
    """On each node, before the steps in `at`: when everything is replicated, notes what the node's link has sent."""

    def __init__(self, at: tuple[int, ...], per_node: int) -> None:
        self.at, self.per_node = at, per_node

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step not in self.at:
            return
        wait_until_replicated(trainer.strategy, step)
        trainer.strategy.barrier()  # nobody computes, and sends, while another one reads
        if trainer.local_rank == 0:
            note = Path(trainer.default_root_dir) / f"sent-{step}-{trainer.global_rank // self.per_node}"
            note.write_text(str(_sent(Nodes.interface)))
        trainer.strategy.barrier()


def _sent(interface: str) -> int:
    """Bytes that an interface of this namespace has sent."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, words = line.partition(":")
        if name.strip() == interface:
            return int(words.split()[8])
    raise RuntimeError(f"/proc/net/dev has no {interface}")


class Sent(NamedTuple):
    """Bytes per step of all nodes."""

    measured: float
    """On the links, training and all."""
    predicted: int
    """What `state.ownership` says."""
    naive: int
    """All that the ranks hold."""


def _measure(place: Site, recipe: Recipe, size: Size) -> Sent:
    at = (size.first, size.first + size.steps)
    job = place.run(recipe, Wire(at, recipe.per_node))
    before, after = ([int((job.directory / f"sent-{step}-{node}").read_text()) for node in range(recipe.nodes)] for step in at)
    found = [sizes(job.directory, rank) for rank in range(recipe.world)]
    return Sent((sum(after) - sum(before)) / size.steps, sum(own["travelling"] for own in found), sum(own["held"] for own in found))


def _layout(place: Site, kind: str, size: Size) -> tuple[Sent, Sent]:
    """With replication and without."""
    options = {"replication": {"copies": _COPIES, "when_behind": "wait"}}
    recipe = Recipe(kind, 2, 2, size.width, size.depth, batch=2, steps=size.first + size.steps + 1, options=options)
    alone = replace(recipe, options={"replication": {"copies": 1}})
    return _measure(place, recipe, size), _measure(place, alone, size)


def measure(quick: bool) -> Report:
    """Run it."""
    report, size = Report("nodes-bytes", "What a step sends to other nodes", quick), _QUICK if quick else _FULL
    try:
        with tempfile.TemporaryDirectory(prefix="gemini-bench-") as name, site(Path(name), namespaces=2) as place:
            _all(place, size, report)
    except NoNamespaces as error:
        report.say(f"Nothing was measured: {error}.")
    return report


def _all(place: Site, size: Size, report: Report) -> None:
    rows = []
    for kind, label in _KINDS.items():
        progress(f"two jobs, {label}")
        ours, without = _layout(place, kind, size)
        sent = ours.measured - without.measured
        figures = (without.measured, ours.naive, ours.predicted, sent)
        rows.append([label, *(number(value / _MB) for value in figures), f"{sent / ours.naive:.3f}"])
        if ours.predicted > _FEW * ours.naive:
            report.check(Check(f"{label}: sent / predicted", sent / ours.predicted, _CLOSE))
        report.check(Check(f"{label}: sent / naive", sent / ours.naive, ours.predicted / ours.naive + _CLOSE - 1))
    header = ["MB per step, all nodes", "training itself", "naive", "predicted", "sent", "sent / naive"]
    report.table("What the links of all nodes carry for replication", header, rows)
    report.say(
        f"An MLP of {size.depth} layers of {size.width}, AdamW, gloo, 2 nodes with 2 ranks; {size.steps} steps. Sent: bytes on the links "
        "(/proc/net/dev, with headers, acknowledgements, votes, etcd and what was sent again) of a job with `replication.copies` 2 less "
        "those of a job with 1. Predicted: the bytes that `state.ownership` lets travel. Naive: every rank's whole state to 1 peer. What "
        "is sent where next to nothing travels (DDP) is the rank-local state, votes, and what two jobs differ by otherwise."
    )


if __name__ == "__main__":
    main(__doc__, measure)
