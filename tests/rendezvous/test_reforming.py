"""Real deaths below Lightning: default group, an own group and a DeviceMesh go on in the hands that hold them, without harm to anybody."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.reforming import Job

SIZE = 4


@pytest.fixture
def job() -> Iterator[Job]:
    with Job(SIZE) as made:
        made.good()
        yield made


@pytest.mark.parametrize("stopped", [False, True], ids=["killed", "stopped"])
def test_all_groups_are_formed_anew_under_the_same_objects(job: Job, stopped: bool) -> None:
    for rank in range(SIZE):
        before = {told.rank: told.pid for told in job.last}
        _, decided = job.replace(rank, stopped=stopped)
        told = job.good()  # the ranks check the sums of all three groups themselves
        assert {each.rank for each in told if each.pid != before[each.rank]} == {rank}, "only the dead one is another process"
        assert max(each.at_ns for each in told) - decided < 1e9, "a survivor was not freed at once"
        assert all(each.listeners <= 3 + each.asleep for each in told), "listeners of old generations are left"


def test_again_and_again_leaves_nothing_behind(job: Job) -> None:
    def look() -> tuple[int, int, int]:
        told = job.last[2]
        # An operation that sleeps in gloo keeps its backend until it times out (see `rendezvous.works`): that is known, and counted.
        return told.descriptors - 5 * told.asleep, told.threads - 3 * told.asleep, told.rss >> 20

    seen = []
    for number in range(12):
        job.replace((0, 1, 3)[number % 3], stopped=bool(number % 2))
        job.good()
        seen.append(look())
    # What the last generation had may be closing still when a rank looks: compare the least of several looks.
    first, last = ([min(column) for column in zip(*window, strict=True)] for window in (seen[:4], seen[-4:]))
    assert last[0] <= first[0] + 2 and last[1] <= first[1] + 1 and last[2] <= first[2] * 1.05, seen


def test_two_at_once(job: Job) -> None:
    """The second dies while the others form their groups for the first: whatever they have built by then is void."""
    for first, second in ((0, 3), (1, 2), (2, 0)):
        job.replace(first, stopped=False)
        job.replace(second, stopped=False)
        assert {told.generation for told in job.good()} == {job.generation}
