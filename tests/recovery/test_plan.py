"""The decision of a recovery: tables of what happens, and properties that hold for any inventory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gemini.recovery.plan import RankInventory, RecoveryPlan, plan

Steps = tuple[int, ...] | None


def live(boundary: int, *, wrote: bool = False, local: Steps = None, tensors: Steps = None) -> RankInventory:
    """A rank that stands still in its step."""
    local, tensors = ((boundary,) if steps is None else steps for steps in (local, tensors))
    return RankInventory(alive=True, boundary=boundary, wrote=wrote, in_step=True, local=frozenset(local), tensors=frozenset(tensors))


def dead(boundary: int, *, local: Steps = None, tensors: Steps = None) -> RankInventory:
    """A rank whose process is gone; what it had committed is still in the node's memory."""
    local, tensors = ((boundary,) if steps is None else steps for steps in (local, tensors))
    return RankInventory(alive=False, boundary=boundary, local=frozenset(local), tensors=frozenset(tensors))


World = Mapping[int, RankInventory]


def world(ranks: list[RankInventory], replicated: bool) -> World:
    """`replicated`: every rank holds what all others hold (DDP); else nobody does (FSDP2)."""
    everybody = frozenset(range(len(ranks)) if replicated else ())
    return {rank: dataclasses.replace(inventory, donors=everybody - {rank}) for rank, inventory in enumerate(ranks)}


TABLE = {
    "everything is committed": ([live(5), dead(5)], True, "in_place", 5, {}),
    "sharded, everything is committed": ([live(5), dead(5)], False, "in_place", 5, {}),
    "the dead rank's copy was draining": ([live(5), dead(5, tensors=(4,))], True, "in_place", 5, {1: 0}),
    "a survivor's copy was draining: it is its own source": ([live(5, tensors=(4,)), dead(5)], True, "in_place", 5, {}),
    "two dead, two donors": (
        [live(5), live(5), dead(5, tensors=()), dead(5, tensors=())],
        True,
        "in_place",
        5,
        {2: 0, 3: 1},
    ),
    "more dead than donors": ([dead(5, tensors=()), live(5), dead(5, tensors=())], True, "in_place", 5, {0: 1, 2: 1}),
    "a torn survivor has its own snapshot": ([live(5, wrote=True), dead(5)], True, "in_place", 5, {}),
    "all are dead and all is committed": ([dead(5), dead(5)], True, "in_place", 5, {}),
    "a survivor is one ahead and steps back": ([live(6, local=(5, 6), tensors=(5, 6)), dead(5)], True, "in_place", 5, {}),
    "a survivor is ahead, a donor has its shard": ([live(6, local=(5, 6), tensors=(6,)), live(5), dead(5)], True, "in_place", 5, {0: 1}),
    "sharded, and the shard was not committed": ([live(6, tensors=(4, 6)), dead(6, tensors=(4,))], False, "rewind", 4, {}),
    "cadence 4: all replicas were torn": ([live(6, wrote=True, tensors=(4,)), dead(6, tensors=(4,))], True, "rewind", 4, {}),
    "a snapshot that not all have does not count": (
        [live(6, wrote=True, tensors=(2, 4)), dead(6, tensors=(0, 2))],
        True,
        "rewind",
        2,
        {},
    ),
    "the dead rank's local state is gone": ([live(6, tensors=(4, 6)), dead(6, local=(), tensors=(4, 6))], True, "rewind", 6, {}),
    "nothing in common": ([live(6, wrote=True, tensors=(4,)), dead(6, tensors=(2,))], True, "restart", -1, {}),
    "a snapshot after the target does not count": ([dead(6, local=(), tensors=(8,)), live(6, tensors=(8,))], False, "restart", -1, {}),
    "dead before the first boundary": ([live(0), dead(-1, local=(), tensors=())], True, "restart", -1, {}),
}


@pytest.mark.parametrize(("ranks", "replicated", "action", "target", "donors"), TABLE.values(), ids=TABLE)
def test_table(ranks: list[RankInventory], replicated: bool, action: str, target: int, donors: dict[int, int]) -> None:
    decided = plan(world(ranks, replicated))
    assert (decided.action, decided.target, decided.donors) == (action, target, donors)
    assert decided.reason


def test_an_empty_world_is_refused() -> None:
    with pytest.raises(ValueError, match="give the inventory of every rank"):
        plan({})


def test_a_donor_holds_all_that_the_rank_holds() -> None:
    """Two model shards, each held by two ranks (data parallelism beside tensor parallelism)."""
    missing = dead(5, tensors=(4,))
    ranks = {
        0: live(5),
        1: live(5),
        2: dataclasses.replace(missing, donors=frozenset({0})),
        3: dataclasses.replace(missing, donors=frozenset({1})),
    }
    assert plan(ranks).donors == {2: 0, 3: 1}
    decided = plan(ranks | {1: dead(5)})
    assert (decided.action, decided.target) == ("restart", -1), "nobody has the shard of rank 3 at step 5, and no snapshot of 4 is complete"


def test_a_rewind_says_how_many_steps_are_repeated() -> None:
    assert plan(world([live(7, wrote=True, tensors=(4,)), dead(7, tensors=(4,))], True)).repeated_steps == 3


def test_in_place_repeats_no_completed_step() -> None:
    assert plan(world([live(7), dead(7)], True)).repeated_steps == 0


def test_the_furthest_log_of_each_group_is_named() -> None:
    def counting(**counters: int) -> RankInventory:
        return RankInventory(alive=True, boundary=3, local=frozenset({3}), tensors=frozenset({3}), counters=counters)

    decided = plan({2: counting(a=4), 0: counting(a=4, b=1), 1: counting(a=2, b=9)})
    assert decided.logs == {"a": (4, 0), "b": (9, 1)}  # of equals the lowest rank
    lands = dataclasses.replace(counting(a=4, b=10), alive=False)
    decided = plan({0: lands, 1: counting(a=4, b=9), 2: counting(a=4)})
    assert decided.logs == {"a": (4, 1), "b": (10, 0)}  # of equals one that does not land: landing overwrites the oldest of its log


# ---- properties

steps = st.integers(0, 4)


@st.composite
def inventories(draw: st.DrawFn) -> RankInventory:
    alive = draw(st.booleans())
    boundary = draw(st.integers(-1, 4))
    return RankInventory(
        alive=alive,
        boundary=boundary,
        wrote=alive and draw(st.booleans()),
        in_step=alive and draw(st.booleans()),
        local=draw(st.frozensets(steps, max_size=2)),
        tensors=draw(st.frozensets(steps, max_size=2)),
        counters=draw(st.dictionaries(st.sampled_from("ab"), st.integers(0, 3))),
    )


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Ranks of the same shard hold the same."""
    ranks = draw(st.lists(inventories(), min_size=1, max_size=5))
    shards = draw(st.lists(st.integers(0, 2), min_size=len(ranks), max_size=len(ranks)))
    alike = [frozenset(other for other, shard in enumerate(shards) if shard == mine) for mine in shards]
    return {rank: dataclasses.replace(inventory, donors=alike[rank] - {rank}) for rank, inventory in enumerate(ranks)}


any_world = given(ranks=worlds())


def sources(ranks: World, target: int) -> set[int]:
    """Ranks whose live tensors are whole and those of `target`."""
    return {rank for rank, inventory in ranks.items() if inventory.alive and not inventory.wrote and inventory.boundary == target}


def holds(decided: RecoveryPlan, ranks: World) -> None:
    """What every plan must satisfy."""
    target = decided.target
    assert target <= min(inventory.boundary for inventory in ranks.values())
    whole = sources(ranks, target)
    if decided.action == "in_place":
        for rank, inventory in ranks.items():
            if rank in decided.donors:
                assert decided.donors[rank] in whole and rank not in whole
                assert decided.donors[rank] in inventory.donors
            else:
                assert rank in whole or target in inventory.tensors, f"the shard of rank {rank} has no source"
            if rank not in whole or inventory.in_step:
                assert target in inventory.local, f"rank {rank} has nothing to go back to"
        assert decided.repeated_steps == 0
    elif decided.action == "rewind":
        assert all(target in inventory.tensors for inventory in ranks.values())
        newest = min(inventory.boundary for inventory in ranks.values())
        assert decided.repeated_steps == newest - target
        later = range(target + 1, newest + 1)
        assert not any(all(step in inventory.tensors for inventory in ranks.values()) for step in later), "not the newest"
    else:
        assert decided.action == "restart" and target == -1
        no_boundary = any(inventory.boundary < 0 for inventory in ranks.values())
        newest = min(inventory.boundary for inventory in ranks.values())
        common = frozenset.intersection(*(inventory.tensors for inventory in ranks.values()))
        assert no_boundary or not any(step <= newest for step in common)
    if decided.action != "in_place":
        assert not decided.donors


@any_world
@settings(max_examples=300, deadline=None)
def test_every_plan_can_be_carried_out(ranks: World) -> None:
    holds(plan(ranks), ranks)


@any_world
@settings(max_examples=80, deadline=None)
def test_no_boundary_means_restart(ranks: World) -> None:
    if any(inventory.boundary < 0 for inventory in ranks.values()):
        assert plan(ranks).action == "restart"


@any_world
@settings(max_examples=80, deadline=None)
def test_the_order_of_the_inventory_does_not_matter(ranks: World) -> None:
    first, again = plan(ranks), plan(dict(ranks))
    turned = plan(dict(reversed(ranks.items())))
    assert first == again
    assert (first.action, first.target, first.logs) == (turned.action, turned.target, turned.logs)
    holds(turned, ranks)


@any_world
@settings(max_examples=80, deadline=None)
def test_a_fault_in_the_recovery_gives_the_same_target(ranks: World) -> None:
    """A replaced rank that has landed at the target and dies again: whatever was donated is committed by now."""
    decided = plan(ranks)
    if decided.action != "in_place":
        return
    at = frozenset({decided.target})
    again = {rank: RankInventory(alive=False, boundary=decided.target, local=at, tensors=at) for rank in ranks}
    assert (plan(again).action, plan(again).target) == ("in_place", decided.target)
