"""What is frozen base: who leaves it, by which sign, and what is checked in another process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_gemini.state.catalogue import Entry, catalogue
from lightning_gemini.state.frozen import Frozen, digest


class Job:
    """A model of which the first layers are frozen, and its optimizer."""

    def __init__(self, seed: int = 1) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(9, 20), nn.Linear(20, 20), nn.Linear(20, 2))
        self.model[:2].requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.model[2].parameters())
        self.frozen = Frozen()

    @property
    def entries(self) -> list[Entry]:
        return catalogue(self.model, [self.optimizer], replicated=True, rank=0, world=2)

    def step(self) -> None:
        self.model(torch.ones(1, 9)).sum().backward()
        self.optimizer.step()

    def begun(self) -> Job:
        self.frozen.begin(self.entries)
        return self

    def left(self) -> set[str]:
        before = set(self.frozen.names)
        self.frozen.review(self.entries)
        return before - self.frozen.names


BASE = {"param/0.weight", "param/0.bias", "param/1.weight", "param/1.bias"}


def test_base_and_state_are_the_catalogue() -> None:
    job = Job().begun()
    job.step()
    assert {entry.name for entry in job.frozen.of(job.entries)} == BASE
    assert len(job.frozen.state(job.entries)) == 2 + 2 * 3 and not job.left()


def test_what_an_optimizer_holds_is_state() -> None:
    job = Job()
    job.optimizer.add_param_group({"params": job.model[0].bias})
    assert job.begun().frozen.names == BASE - {"param/0.bias"}


def unfreeze(job: Job) -> None:
    job.model[1].bias.requires_grad_(True)


def hold(job: Job) -> None:
    job.optimizer.add_param_group({"params": [job.model[1].bias]})


def write(job: Job) -> None:
    with torch.no_grad():
        job.model[1].bias.add_(1)


def exchange(job: Job) -> None:
    job.model[1].bias.data = job.model[1].bias.data.clone()


@pytest.mark.parametrize("change", [unfreeze, hold, write, exchange])
def test_one_that_changes_leaves_for_good(change: Callable[[Job], None]) -> None:
    job = Job().begun()
    change(job)
    assert job.left() == {"param/1.bias"}
    assert job.frozen.watched == ({"param/1.bias"} if change in (write, exchange) else set())
    job.model[1].bias.requires_grad_(False)
    job.frozen.review(job.entries)
    assert job.frozen.names == BASE - {"param/1.bias"}


def test_writes_that_torch_does_not_count_end_the_base() -> None:
    job = Job().begun()
    job.model[1].weight.data.mul_(0.5)
    assert job.left() == BASE and job.frozen.watched == BASE
    seen = job.frozen.seen(job.entries)
    job.model[0].weight.data.mul_(0.5)
    assert job.frozen.seen(job.entries) != seen


def test_another_process_knows_what_differs() -> None:
    job, same, other = Job().begun(), Job(), Job(seed=2)
    for process in (same, other):
        process.frozen.load(job.frozen.record)
        assert process.frozen.names == BASE and process.frozen.ever
    assert not same.frozen.differing(same.entries)
    assert {entry.name for entry in other.frozen.differing(other.entries)} == BASE
    other.model.load_state_dict(job.model.state_dict())
    assert not other.frozen.differing(other.entries)


def test_going_back_to_an_earlier_boundary() -> None:
    """What has left since is base again, and right only if nobody has written to it."""
    job = Job().begun()
    record = job.frozen.record
    unfreeze(job)
    write(job)
    assert job.left() == {"param/1.bias"} and job.frozen.record != record
    job.frozen.load(record)
    assert [entry.name for entry in job.frozen.differing(job.entries)] == ["param/1.bias"]
    with torch.no_grad():
        job.model[1].bias.sub_(1)  # rounding may have lost a bit
    assert len(job.frozen.differing(job.entries)) <= 1


def test_a_job_without_a_base_has_no_record() -> None:
    job = Job()
    job.model.requires_grad_(True)
    assert not job.begun().frozen.ever and job.frozen.record == b""
    job.frozen.load(b"")
    assert not job.frozen.names


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (1 << 20, 5)])
def test_checksums(shape: tuple[int, ...]) -> None:
    tensor = torch.rand(shape)
    assert digest(tensor) == digest(tensor.clone())
    if tensor.numel():
        assert digest(tensor) != digest(tensor + 1)
    if len(shape) == 2:
        assert digest(tensor.t()) == digest(tensor.t().contiguous()) != digest(tensor)
