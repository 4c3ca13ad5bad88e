"""Stock torch on a peer store: four forked ranks do what programs do with groups, and no server is there."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from lightning_gemini.peers.node import PeerNode
from lightning_gemini.peers.roster import Roster
from lightning_gemini.rendezvous.store import PeerStore
from tests.support.forked import Ranks
from tests.support.peers import new_job

WORLD = 4
LIMIT = timedelta(seconds=30)
Work = Callable[[PeerStore, int], object]
Run = Callable[..., list[str]]


@pytest.fixture
def run() -> Iterator[Run]:
    """Runs `work(store, rank)` on forked ranks of one gloo world; the answer is what each rank returned, as text."""
    started: list[Ranks] = []

    def start(work: Work, size: int = WORLD, environment: dict[str, str] | None = None) -> list[str]:
        job = new_job()

        def body(rank: int, tell: Callable[[str], None]) -> None:
            node = PeerNode(Roster.on_one_node(job, size), rank, timeout_s=20)
            store = PeerStore(node)
            os.environ.update(environment or {})
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=LIMIT)
            tell(str(work(store, rank)).replace("\n", " "))
            signal.pause()  # nobody leaves before the test is over

        started.append(Ranks(body, size))
        return [started[-1].hear(rank) for rank in range(size)]

    yield start
    for ranks in started:
        ranks.end()


def total(value: float, group: dist.ProcessGroup | None = None) -> float:
    x = torch.tensor([value])
    dist.all_reduce(x, group=group)
    return x.item()


def test_all_reduce_and_barriers(run: Run) -> None:
    def work(store: PeerStore, rank: int) -> object:
        before = total(2.0**rank)
        dist.barrier()
        dist.monitored_barrier(timeout=LIMIT)
        return before, total(10.0**rank)

    assert run(work) == ["(15.0, 1111.0)"] * WORLD


def test_a_monitored_barrier_names_who_is_missing(run: Run) -> None:
    def work(store: PeerStore, rank: int) -> object:
        if rank == 2:
            store.wait(["rank 0 has given up"])
            return "absent"
        try:
            dist.monitored_barrier(timeout=timedelta(seconds=0.5))
        except RuntimeError as error:
            return error
        finally:
            store.set("rank 0 has given up", "")

    told = run(work)
    assert told[2] == "absent"
    assert "Rank 2" in told[0] or "ranks 2" in told[0].lower(), told[0]


def test_groups_of_some_overlapping_and_alone(run: Run) -> None:
    def work(store: PeerStore, rank: int) -> object:
        sums = []
        for members in ([0, 1], [1, 2, 3], [3, 0], [2], [0, 1, 2, 3], [1, 2, 3]):
            group = dist.new_group(members, timeout=LIMIT)
            sums.append(int(total(10.0**rank, group)) if rank in members else 0)
        return sums

    assert run(work) == [
        "[11, 0, 1001, 0, 1111, 0]",
        "[11, 1110, 0, 0, 1111, 1110]",
        "[0, 1110, 0, 100, 1111, 1110]",
        "[0, 1110, 1001, 0, 1111, 1110]",
    ]


def test_a_device_mesh_has_a_group_for_each_row_and_column(run: Run) -> None:
    def work(store: PeerStore, rank: int) -> object:
        mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
        return [int(total(10.0**rank, mesh.get_group(name))) for name in ("rows", "columns")]

    assert run(work) == ["[101, 11]", "[1010, 11]", "[101, 1100]", "[1010, 1100]"]


def test_objects_travel(run: Run) -> None:
    def work(store: PeerStore, rank: int) -> object:
        everyone: list[object] = [None] * WORLD
        dist.all_gather_object(everyone, {"rank": rank, "text": "x" * rank})
        word = [("from", rank)]
        dist.broadcast_object_list(word, src=3)
        return everyone == [{"rank": number, "text": "x" * number} for number in range(WORLD)], word

    assert run(work) == ["(True, [('from', 3)])"] * WORLD


def test_prefixes_and_clones_share_the_ranks_but_not_the_names(run: Run) -> None:
    def work(store: PeerStore, rank: int) -> object:
        inner = dist.PrefixStore("inner", store)
        for where in (store, inner, store.clone()):
            where.add("n", 1)
        dist.barrier()
        if rank == 1:
            inner.set("k", "of the prefix")
            store.clone().set("k", "of the clone")
        inner.wait(["k"], LIMIT)
        counts = store.add("n", 0), inner.add("n", 0), dist.PrefixStore("inner", store.clone()).add("n", 0)
        return counts, inner.get("k"), store.get("k"), inner.check(["k"]), inner.check(["k", "none"])

    assert run(work) == ["((8, 4, 4), b'of the prefix', b'of the clone', True, False)"] * WORLD


def test_torchs_own_barrier_at_the_store(run: Run) -> None:
    def work(store: PeerStore, rank: int) -> object:
        return total(1.0)

    assert run(work, environment={"TORCH_DIST_INIT_BARRIER": "1"}) == ["4.0"] * WORLD


def test_a_gloo_that_reads_key_by_key(run: Run) -> None:
    def work(store: PeerStore, rank: int) -> object:
        assert not store._gathered, "the group was exchanged at once: this is not the case to be tested"
        group = dist.new_group([1, 3], timeout=LIMIT)
        return total(1.0), total(1.0, group) if rank in (1, 3) else None

    assert run(work, environment={"GLOO_ENABLE_STORE_V2_API": "0"}) == ["(4.0, None)", "(4.0, 2.0)"] * 2


def test_a_gloo_that_reads_all_keys_at_once(run: Run) -> None:
    assert run(lambda store, rank: len(store._gathered)) == [str(WORLD)] * WORLD


def test_nobody_is_asked_by_more_than_log2_others(run: Run) -> None:
    """Sixteen ranks form a group: the busiest listener has taken four connections and answered four requests."""

    def work(store: PeerStore, rank: int) -> object:
        return f"{store._node.accepted} {store._node.requests}"

    busy = [tuple(map(int, told.split())) for told in run(work, size=16)]
    assert all(accepted <= 4 and requests <= 4 for accepted, requests in busy), busy
    assert any(accepted for accepted, _ in busy), "the group was not formed by way of the peers"


def test_a_member_that_does_not_come_is_reported_in_time() -> None:
    job = new_job()

    def body(rank: int, tell: Callable[[str], None]) -> None:
        store = PeerStore(PeerNode(Roster.on_one_node(job, 2), rank))
        dist.PrefixStore("whatever is around it", store).set_timeout(timedelta(seconds=0.7))
        began = time.monotonic()
        tell("there")
        if rank == 0:
            try:
                dist.init_process_group("gloo", store=store, rank=0, world_size=2)
            except RuntimeError as error:
                tell(f"{0.7 <= time.monotonic() - began < 2} {type(error).__name__} {error}".replace("\n", " "))
        signal.pause()

    ranks = Ranks(body, 2)
    try:
        assert [ranks.hear(rank) for rank in range(2)] == ["there"] * 2
        told = ranks.hear(0)
        assert told.startswith("True DistStoreError") and "0.7 s" in told and "the 2 members of group '0//cpu" in told, told
    finally:
        ranks.end()
