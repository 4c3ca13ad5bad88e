"""The group between recoveries: errors inside a step are absorbed, results that peers have logged are read instead of waited for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist

from lightning_gemini.agent.memory import NodeFiles, create_files
from lightning_gemini.peers.errors import StaleGeneration
from lightning_gemini.rendezvous.group import SwappableGroup
from lightning_gemini.rendezvous.world import Mode, World, pack, unpack
from lightning_gemini.snapshot.collective_log import CollectiveLog
from tests.support.groups import RANK, SIZE, lone_world, options, t


@pytest.fixture
def files() -> Iterator[NodeFiles]:
    made = create_files(SIZE)
    yield made
    made.close()


@pytest.fixture
def world() -> Iterator[World]:
    yield from lone_world()


@pytest.fixture
def group(world: World) -> SwappableGroup:
    world.mode = Mode.STEP
    return SwappableGroup(world, RANK, range(SIZE), "0")


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
    world.membership.announced = 1
    work = start(group)
    assert work.wait()
    work.get_future().wait()
    first = world.error
    assert isinstance(first, StaleGeneration)
    start(group).wait()
    assert world.error is first, "the first error is kept"


# ---- between steps: results of peers are replayed


def replayed(files: NodeFiles, world: World, record: list[list[torch.Tensor]]) -> SwappableGroup:
    """A group whose peers have logged these results."""
    log = CollectiveLog(os.dup(files.logs[0]))
    log.allocate(1 << 16)
    log.rotate({})
    for index, tensors in enumerate(record):
        log.append("0", index, pack(tensors))
    world.replay = log.results()
    log.close()
    os.close(log.fd)
    world.log = CollectiveLog(files.logs[RANK])
    world.log.allocate(1 << 16)
    world.log.rotate({})
    world.mode = Mode.BETWEEN
    return SwappableGroup(world, RANK, range(SIZE), "0")


def test_recorded_collectives_are_read_instead_of_run(world: World, files: NodeFiles) -> None:
    group = replayed(files, world, [[t(10, 20)], [], [t(7)], [t(1), t(2), t(3)], [t(6, 9, 12)], [t(12)]])
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


def test_a_result_that_did_not_fit_the_log_says_what_to_raise(world: World, files: NodeFiles) -> None:
    group = replayed(files, world, [])
    world.replay = {("0", 0): None}
    with pytest.raises(RuntimeError, match="raise snapshot.collective_log_mib"):
        group.allreduce([t(1)])
    assert world.log is not None
    world.log.close()


def test_a_result_of_another_size_is_refused(world: World, files: NodeFiles) -> None:
    group = replayed(files, world, [[t(1, 2, 3)]])
    with pytest.raises(RuntimeError, match="12 bytes where 4 are expected: the script is not deterministic"):
        group.allreduce([t(1)])
    assert world.log is not None
    world.log.close()


def test_a_failed_collective_between_steps_is_tried_again_after_the_recovery(world: World, files: NodeFiles) -> None:
    """Here the recovery brings the peers' result; the input is as the caller gave it when it is tried again."""
    group, seen = replayed(files, world, []), []
    world.membership.announced = 1

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
