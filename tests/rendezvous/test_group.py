"""The group that everybody holds: what it answers when nobody is there, and how it repeats what its peers have logged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_gemini.rendezvous.group import SwappableGroup
from lightning_gemini.rendezvous.world import Mode, World
from tests.support.groups import RANK, SIZE, lone_world, options, t


@pytest.fixture
def world() -> Iterator[World]:
    yield from lone_world()


@pytest.fixture
def group(world: World) -> SwappableGroup:
    world.mode = Mode.STAND_IN
    return SwappableGroup(world, RANK, range(SIZE), "0")


# ---- alone: as if all ranks had sent what we send


@pytest.mark.parametrize(
    ("op", "dtype", "expected"),
    [
        (dist.ReduceOp.SUM, torch.float32, [3, 6]),
        (dist.ReduceOp.SUM, torch.int64, [3, 6]),
        (dist.ReduceOp.AVG, torch.float32, [1, 2]),
        (dist.ReduceOp.AVG, torch.int64, [1, 2]),
        (dist.ReduceOp.MAX, torch.float32, [1, 2]),
        (dist.ReduceOp.MIN, torch.int64, [1, 2]),
    ],
    ids=str,
)
def test_allreduce_alone(group: SwappableGroup, op: Any, dtype: torch.dtype, expected: list[int]) -> None:
    x = t(1, 2, dtype=dtype)
    assert group.allreduce([x], options(dist.AllreduceOptions, reduceOp=op)).wait()
    assert x.dtype == dtype and x.tolist() == expected
    y = t(1, 2, dtype=dtype)
    group.allreduce_coalesced([y], options(dist.AllreduceCoalescedOptions, reduceOp=op)).wait()
    assert y.tolist() == expected


def test_a_parameter_can_be_reduced_and_broadcast(group: SwappableGroup) -> None:
    parameter = torch.nn.Parameter(t(1, 2))
    group.broadcast([parameter]).wait()
    group.allreduce([parameter]).wait()
    assert parameter.tolist() == [3, 6]


def test_gathering_alone(group: SwappableGroup) -> None:
    outs = [torch.empty(2) for _ in range(SIZE)]
    group.allgather([outs], [t(1, 2)]).wait()
    assert [o.tolist() for o in outs] == [[1, 2]] * SIZE
    for gather in (group._allgather_base, group.all_gather_single):
        flat = torch.empty(6)
        gather(flat, t(1, 2)).wait()
        assert flat.tolist() == [1, 2] * SIZE
    flats = [torch.empty(6), torch.empty(3)]
    group.allgather_into_tensor_coalesced(flats, [t(1, 2), t(5)]).wait()
    assert [f.tolist() for f in flats] == [[1, 2] * SIZE, [5] * SIZE]


def test_reduce_scatter_alone(group: SwappableGroup) -> None:
    for scatter in (group._reduce_scatter_base, group.reduce_scatter_single):
        out = torch.empty(2)
        scatter(out, t(1, 2, 3, 4, 5, 6)).wait()
        assert out.tolist() == [9, 12], "this rank's part of the sum"
    out = torch.empty(2)
    group._reduce_scatter_base(out, t(1, 2, 3, 4, 5, 6), options(dist.ReduceScatterOptions, reduceOp=dist.ReduceOp.AVG)).wait()
    assert out.tolist() == [3, 4]
    group.reduce_scatter([out], [[t(1, 2), t(3, 4), t(5, 6)]]).wait()
    assert out.tolist() == [9, 12]
    group.reduce_scatter_tensor_coalesced([out], [t(1, 2, 3, 4, 5, 6)]).wait()
    assert out.tolist() == [9, 12]


@pytest.mark.parametrize("root", range(SIZE))
def test_with_a_root_alone(group: SwappableGroup, root: int) -> None:
    x = t(1, 2)
    group.broadcast([x], options(dist.BroadcastOptions, rootRank=root)).wait()
    assert x.tolist() == [1, 2]
    group.reduce([x], options(dist.ReduceOptions, rootRank=root)).wait()
    assert x.tolist() == ([3, 6] if root == RANK else [1, 2])
    outs = [[torch.zeros(2) for _ in range(SIZE)]] if root == RANK else []
    group.gather(outs, [t(1, 2)], options(dist.GatherOptions, rootRank=root)).wait()
    assert all(o.tolist() == [1, 2] for part in outs for o in part)
    out = torch.zeros(1)
    parts = [[t(1), t(2), t(3)]] if root == RANK else []
    group.scatter([out], parts, options(dist.ScatterOptions, rootRank=root)).wait()
    assert out.tolist() == ([2] if root == RANK else [0])


def test_all_to_all_alone(group: SwappableGroup) -> None:
    outs = [torch.empty(1) for _ in range(SIZE)]
    group.alltoall(outs, [t(1), t(2), t(3)]).wait()
    assert [o.item() for o in outs] == [2] * SIZE
    for exchange in (group.alltoall_base, group.all_to_all_single):
        out = torch.empty(6)
        exchange(out, t(1, 2, 3, 4, 5, 6), [], []).wait()
        assert out.tolist() == [3, 4] * SIZE


@pytest.mark.parametrize("mode", [Mode.STAND_IN, Mode.BETWEEN])
def test_what_could_not_be_replayed_is_refused(group: SwappableGroup, world: World, mode: Mode) -> None:
    world.mode = mode
    with pytest.raises(NotImplementedError, match="send outside a training step"):
        group.send([t(1)], 0, 0)
    with pytest.raises(NotImplementedError, match="recv outside a training step"):
        group.recv([t(1)], 0, 0)
    with pytest.raises(NotImplementedError, match="unequal splits"):
        group.alltoall_base(torch.empty(3), t(1, 2, 3), [1, 2, 0], [1, 1, 1])


def test_barrier_and_futures_alone(group: SwappableGroup) -> None:
    assert group.barrier().wait()
    x = t(1)
    work = group.allreduce([x])
    assert work.is_completed() and work.is_success()
    assert work.get_future().wait()[0] is x


def test_alone_leaves_no_trace(group: SwappableGroup, world: World) -> None:
    group.allreduce([t(1)])
    assert world.counters == {} and world.error is None


@pytest.mark.parametrize("mode", list(Mode))
def test_a_group_of_one_needs_nobody(world: World, mode: Mode) -> None:
    world.mode = mode
    x, single = t(4), SwappableGroup(world, 0, [RANK], "me")
    single.allreduce([x]).wait()
    single.barrier().wait()
    out = torch.empty(1)
    single._reduce_scatter_base(out, x).wait()
    assert x.item() == out.item() == 4


def test_names(group: SwappableGroup) -> None:
    assert (group.getBackendName(), group.group_name, group.group_desc, group.size(), group.rank()) == ("gemini", "0", "0", SIZE, RANK)
