"""Runs jobs of several nodes and compares them: what every test of this folder asserts is here."""

from __future__ import annotations

import functools
import signal
import time
import uuid
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.multinode.models import Recipe, Strike, script
from tests.support.cluster import JobOnNodes, on_nodes
from tests.support.etcd import Etcd
from tests.support.jobs import VOLATILE, Result, run_job

PREFIX = "/lightning_gemini/"
LIMIT_S = 60.0


class Expected:
    """What undisturbed runs on one node give, each made once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._known: dict[str, Result] = {}

    def __call__(self, recipe: Recipe) -> Result:
        """Of a recipe."""
        known = self._known.get(repr(recipe))
        if known is None:
            directory = self.directory / str(len(self._known))
            known = self._known[repr(recipe)] = run_job(directory, script(directory, 1, recipe.world, recipe), recipe.world)
            assert known.exit_status == 0, known.output[-6000:]
            assert len(known.ranks) == recipe.world
        return known


@dataclass
class Lab:
    """One etcd and one folder for the jobs of a test."""

    directory: Path
    etcd: Etcd
    expected: Expected

    def start(
        self,
        recipe: Recipe,
        nodes: int,
        *strikes: Strike,
        spares: int = 0,
        membership: dict[str, Any] | None = None,
        wrapped: Callable[[Callable[[], None]], None] | None = None,
        domains: Sequence[str] = (),
        **options: Any,
    ) -> JobOnNodes:
        """A job under way. `wrapped` is the script around the training; `options` are the strategy's."""
        directory = self.directory / f"job-{uuid.uuid4().hex[:8]}"  # the job's name: no other on this machine has it
        per_node = recipe.world // nodes
        target = script(directory, nodes, per_node, recipe, *strikes, **options)
        whole = target if wrapped is None else functools.partial(wrapped, target)
        return on_nodes(directory, [self.etcd.url], whole, nodes, per_node, spares=spares, domains=domains, membership=membership or {})

    def run(
        self,
        recipe: Recipe,
        nodes: int,
        *strikes: Strike,
        spares: int = 0,
        during: Callable[[JobOnNodes], object] | None = None,
        all_must_strike: bool = True,
        **more: Any,
    ) -> JobOnNodes:
        """A job to its end; `during` may disturb it. Every strike must have happened, and nothing may be left."""
        job = self.start(recipe, nodes, *strikes, spares=spares, **more)
        try:
            if during is not None:
                during(job)
            job.wait(LIMIT_S)
        finally:
            job.stop()
        missed = [strike for number, strike in enumerate(strikes) if not (job.directory / f"struck-{number}").exists()]
        assert not (missed and all_must_strike), f"{missed} did not happen\n{job.outputs()}"
        self.nothing_left(job)
        return job

    def leader(self, job: JobOnNodes) -> int:
        """The node whose agent leads the membership."""
        (pair,) = self.etcd.ask("kv/range", key=b64encode(f"{PREFIX}{job.directory.name}/leader".encode()).decode())["kvs"]
        name = b64decode(pair["value"]).decode(errors="replace")
        (number,) = [number for number, pid in job.groups.items() if f"-{pid}-" in name]
        return number

    def nothing_left(self, job: JobOnNodes) -> None:
        """Neither processes nor keys, soon after the end."""
        until(lambda: not any(job.alive(number) for number in job.groups), f"the end of all processes\n{job.outputs()}")
        if not any(status == -signal.SIGKILL for status in job.statuses.values()):
            until(lambda: not self.etcd.keys(PREFIX), f"the end of the job's keys in etcd\n{job.outputs()}")
        else:  # who is killed at the very end leaves what its lease and the job's keep, for a minute
            assert all(self.etcd.keys(PREFIX).values()), "keys without a lease"

    def same(
        self,
        recipe: Recipe,
        job: JobOnNodes,
        *,
        recoveries: int = 0,
        repeated: int | range = 0,
        lost: Iterable[int] = (),
        replaced: Iterable[int] = (),
    ) -> None:
        """Bit-equal to the undisturbed run on one node, and everybody who was not struck kept its process.

        Args:
            recoveries: how many.
            repeated: completed steps that were computed again.
            lost: nodes that did not live to the end.
            replaced: ranks that had more than one process.
        """
        said, lost, replaced = job.outputs(), set(lost), set(replaced)
        assert {number for number, status in job.statuses.items() if status} == lost, f"{job.statuses}\n{said}"
        self.same_bits(recipe, job)
        assert len(job.recoveries) == recoveries, f"{job.recoveries}\n{said}"
        found = sum(recovery["repeated_steps"] for recovery in job.recoveries)
        assert found in (repeated if isinstance(repeated, range) else [repeated]), f"{found} steps repeated\n{said}"
        pids = job.pids()
        assert {rank for rank in pids if len(pids[rank]) > 1} == replaced, f"{pids}\n{said}"
        assert all(pids[rank][-1] == job.ranks[rank]["pid"] for rank in pids)

    def same_bits(self, recipe: Recipe, job: JobOnNodes) -> None:
        """Every rank has ended with what it has in the undisturbed run."""
        expected = self.expected(recipe).ranks
        assert job.ranks.keys() == expected.keys(), f"{job.statuses}\n{job.outputs()}"
        for rank, record in expected.items():
            for key in record.keys() - VOLATILE:
                assert job.ranks[rank][key] == record[key], f"rank {rank}: {key} differs\n{job.outputs()}"


def until(condition: Callable[[], bool], what: str, limit_s: float = 20.0) -> None:
    """Wait for something that gives no sign."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit_s:g} s for {what}"
        time.sleep(0.01)
