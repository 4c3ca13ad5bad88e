"""The group that everybody holds: what it answers when nobody is there, and how it repeats what its peers have logged."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_gemini.agent.memory import NodeFiles, create_files
from lightning_gemini.rendezvous.group import SwappableGroup
from lightning_gemini.rendezvous.link import StaleGeneration
from lightning_gemini.rendezvous.world import Mode, World, pack, unpack
from lightning_gemini.snapshot.collective_log import CollectiveLog

SIZE, RANK = 3, 1


class LoneLink:
    """Knows what a `Link` knows, and reaches nobody."""

    def __init__(self, files: NodeFiles) -> None:
        self.world, self.rank, self.announced, self.files = SIZE, RANK, 0, files


@pytest.fixture
def world() -> Iterator[World]:
    files = create_files(SIZE)
    yield World(LoneLink(files), 5.0)  # type: ignore[arg-type]
    files.close()


@pytest.fixture
def group(world: World) -> SwappableGroup:
    world.mode = Mode.STAND_IN
    return SwappableGroup(world, RANK, SIZE, "0")


def t(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def options(kind: Any, **fields: Any) -> Any:
    made = kind()
    for name, value in fields.items():
        setattr(made, name, value)
    return made


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
    x, single = t(4), SwappableGroup(world, 0, 1, "me")
    single.allreduce([x]).wait()
    single.barrier().wait()
    out = torch.empty(1)
    single._reduce_scatter_base(out, x).wait()
    assert x.item() == out.item() == 4


def test_names(group: SwappableGroup) -> None:
    assert (group.getBackendName(), group.group_name, group.group_desc, group.size(), group.rank()) == ("gemini", "0", "0", SIZE, RANK)


# ---- inside a step: an error is absorbed


Start = Callable[[SwappableGroup], dist.Work]
IN_STEP: dict[str, Start] = {
    "allreduce": lambda g: g.allreduce([t(1)]),
    "average": lambda g: g.allreduce([t(1)], options(dist.AllreduceOptions, reduceOp=dist.ReduceOp.AVG)),
    "broadcast": lambda g: g.broadcast([t(1)]),
    "allgather": lambda g: g.allgather([[t(1)] * SIZE], [t(1)]),
    "flat allgather": lambda g: g._allgather_base(torch.empty(3), t(1)),
    "reduce_scatter": lambda g: g._reduce_scatter_base(t(1), torch.empty(3)),
    "barrier": lambda g: g.barrier(),
    "send": lambda g: g.send([t(1)], 0, 0),
    "alltoall": lambda g: g.alltoall_base(torch.empty(3), torch.empty(3), [], []),
}


@pytest.mark.parametrize("start", IN_STEP.values(), ids=IN_STEP)
def test_in_a_step_a_collective_never_raises(group: SwappableGroup, world: World, start: Start) -> None:
    """A recovery was announced: no group can be formed."""
    world.mode, world.link.announced = Mode.STEP, 1
    work = start(group)
    assert work.wait()
    work.get_future().wait()
    first = world.error
    assert isinstance(first, StaleGeneration)
    start(group).wait()
    assert world.error is first, "the first error is kept"


# ---- between steps: results of peers are replayed


def replayed(world: World, record: list[list[torch.Tensor]]) -> SwappableGroup:
    """A group whose peers have logged these results."""
    log = CollectiveLog(os.dup(world.link.files.logs[0]))
    log.allocate(1 << 16)
    log.rotate({})
    for index, tensors in enumerate(record):
        log.append("0", index, pack(tensors))
    world.replay = log.results()
    log.close()
    os.close(log.fd)
    world.log = CollectiveLog(world.link.files.logs[RANK])
    world.log.allocate(1 << 16)
    world.log.rotate({})
    world.mode = Mode.BETWEEN
    return SwappableGroup(world, RANK, SIZE, "0")


def test_recorded_collectives_are_read_instead_of_run(world: World) -> None:
    group = replayed(world, [[t(10, 20)], [], [t(7)], [t(1), t(2), t(3)], [t(6, 9, 12)], [t(12)]])
    x = t(1, 2)
    group.allreduce([x]).wait()
    assert x.tolist() == [10, 20]
    group.barrier().wait()
    y = t(0)
    group.broadcast([y]).wait()
    outs = [torch.empty(1) for _ in range(SIZE)]
    group.allgather([outs], [t(5)]).wait()
    assert (y.item(), [o.item() for o in outs]) == (7, [1, 2, 3])
    part = torch.empty(1)
    group._reduce_scatter_base(part, t(1, 2, 3)).wait()
    assert part.item() == 9, "this rank's part of what was reduced"
    mean = t(0)
    group.allreduce([mean], options(dist.AllreduceOptions, reduceOp=dist.ReduceOp.AVG)).wait()
    assert mean.item() == 4
    assert world.counters == {"0": 6} and not world.replay
    assert world.log is not None
    assert world.log.counters() == {"0": 6} and world.log.results()[("0", 5)] == pack([t(12)]), "it can serve the next replaced rank"
    world.log.close()


def test_a_result_that_did_not_fit_the_log_says_what_to_raise(world: World) -> None:
    group = replayed(world, [])
    world.replay = {("0", 0): None}
    with pytest.raises(RuntimeError, match="raise snapshot.collective_log_mib"):
        group.allreduce([t(1)])
    assert world.log is not None
    world.log.close()


def test_a_result_of_another_size_is_refused(world: World) -> None:
    group = replayed(world, [[t(1, 2, 3)]])
    with pytest.raises(RuntimeError, match="12 bytes where 4 are expected: the script is not deterministic"):
        group.allreduce([t(1)])
    assert world.log is not None
    world.log.close()


def test_a_failed_collective_between_steps_is_tried_again_after_the_recovery(world: World) -> None:
    """Here the recovery brings the peers' result; the input is as the caller gave it when it is tried again."""
    group, seen = replayed(world, []), []
    world.link.announced = 1

    def recover(error: BaseException | None) -> None:
        seen.append(error)
        world.generation, world.replay = 1, {("0", 0): pack([t(5)])}

    world.stand_still = recover
    x = t(1)
    group.allreduce([x]).wait()
    assert x.item() == 5 and seen == [None]
    assert world.log is not None
    world.log.close()


@pytest.mark.parametrize("tensors", [[], [t(1, 2)], [t(), t(3.5)], [torch.ones(2, 3).t()], [torch.tensor([True, False]), torch.tensor(5)]])
def test_pack_and_unpack(tensors: list[torch.Tensor]) -> None:
    found = [torch.zeros_like(tensor) for tensor in tensors]
    unpack(pack(tensors), found)
    assert all(torch.equal(a, b) for a, b in zip(tensors, found, strict=True))
