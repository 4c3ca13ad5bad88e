"""The decision where nodes can vanish: what is left of a rank is at peers, and it must be enough for everybody at one step."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gemini.recovery.plan import Fetch, RankInventory, RecoveryPlan, plan

NOTHING = RankInventory(alive=False, boundary=-1)
CHECKPOINT = (2, "store/step-2.a")


def live(boundary: int, at: int | None = None, tensors: tuple[int, ...] | None = None, key: str = "", **more: object) -> RankInventory:
    """A survivor in step `at`, its two newest snapshots in its node's memory."""
    steps = (boundary - 1, boundary) if tensors is None else tensors
    return RankInventory(
        alive=True, boundary=boundary, at=boundary if at is None else at, in_step=True, local=frozenset({boundary - 1, boundary}),
        tensors=frozenset(steps), keys=dict.fromkeys(steps, key), **more,  # type: ignore[arg-type]
    )  # fmt: skip


def decided(ranks: list[RankInventory], replicas: dict[int, dict[int, dict[int, str]]], per_node: int = 1, **more: object) -> RecoveryPlan:
    return plan(dict(enumerate(ranks)), ranks_per_node=per_node, replicas=replicas, **more)  # type: ignore[arg-type]


def test_a_lost_node_comes_back_from_its_peer() -> None:
    found = decided([live(5), NOTHING], {0: {1: {4: "", 5: ""}}})
    assert (found.action, found.target, found.repeated_steps, found.replaced) == ("in_place", 5, 0, [1])
    assert found.fetch == {1: Fetch([0], [])}


def test_the_newest_snapshot_had_not_arrived() -> None:
    found = decided([live(5), NOTHING], {0: {1: {3: "", 4: ""}}})
    assert (found.action, found.target, found.repeated_steps) == ("rewind", 4, 1)
    assert found.fetch == {1: Fetch([0], [])}


def test_survivors_that_have_not_left_the_step_take_their_write_back_in_place() -> None:
    """They have committed 6 and wait for the lost rank to do so."""
    found = decided([live(6, at=5, wrote=True), NOTHING], {0: {1: {5: ""}}})
    assert (found.action, found.target, found.repeated_steps) == ("in_place", 5, 0)


def test_what_does_not_travel_comes_from_all_twins() -> None:
    ranks = [live(5, key="a"), live(5, key="b"), NOTHING, NOTHING, live(5, key="a"), live(5, key="b")]
    found = decided(ranks, {0: {2: {5: "a"}, 3: {5: "b"}}}, per_node=2)
    assert found.fetch == {2: Fetch([0], [(0, 0), (2, 4)]), 3: Fetch([0], [(0, 1), (2, 5)])}


def test_a_replica_without_any_twin_is_of_no_use() -> None:
    found = decided([live(5, key="a"), NOTHING, live(5, key="a")], {0: {1: {4: "a", 5: "other"}}})
    assert (found.action, found.target) == ("rewind", 4)


def test_sources_with_another_layout_are_not_mixed() -> None:
    ranks = [live(5, key="a"), NOTHING, live(5, key="a")]
    found = decided(ranks, {0: {1: {5: "a"}}, 2: {1: {5: "stale"}}})
    assert found.fetch == {1: Fetch([0], [(0, 0), (2, 2)])}


def test_two_nodes_of_different_groups() -> None:
    ranks = [live(5), NOTHING, NOTHING, live(5)]
    found = decided(ranks, {0: {1: {5: ""}}, 3: {2: {4: "", 5: ""}}})
    assert (found.action, found.target, found.replaced) == ("in_place", 5, [1, 2])
    assert found.fetch == {1: Fetch([0], []), 2: Fetch([3], [])}


def test_the_last_replicated_step_of_one_counts_for_all() -> None:
    ranks = [live(5), NOTHING, NOTHING, live(5)]
    found = decided(ranks, {0: {1: {5: ""}}, 3: {2: {4: ""}}})
    assert found.action == "restart", "rank 1's copy of step 4 has been overwritten"
    found = decided(ranks, {0: {1: {4: "", 5: ""}}, 3: {2: {4: ""}}})
    assert (found.action, found.target, set(found.fetch)) == ("rewind", 4, {1, 2})


@pytest.mark.parametrize(("persisted", "action", "target", "repeated"), [(CHECKPOINT, "storage", 2, 3), ((-1, ""), "restart", -1, 5)])
def test_a_whole_group_is_lost(persisted: tuple[int, str], action: str, target: int, repeated: int) -> None:
    found = decided([NOTHING, NOTHING, live(5), live(5)], {2: {3: {5: ""}}}, persisted=persisted)
    assert (found.action, found.target, found.repeated_steps) == (action, target, repeated)
    assert found.path == (persisted[1] if action == "storage" else "")


def test_a_node_that_is_lost_before_the_first_boundary_costs_nothing() -> None:
    found = decided([live(-1, tensors=()), NOTHING], {}, persisted=CHECKPOINT)
    assert (found.action, found.repeated_steps) == ("restart", 0)


steps = st.sets(st.integers(0, 8), max_size=2)


@given(
    st.lists(st.one_of(st.none(), st.tuples(st.integers(1, 8), st.integers(0, 1))), min_size=2, max_size=6),
    st.dictionaries(st.integers(0, 5), st.dictionaries(st.integers(0, 5), steps, max_size=4), max_size=4),
    st.integers(-1, 3),
)
@settings(max_examples=400, deadline=None)
def test_every_plan_can_be_carried_out(nodes: list[tuple[int, int] | None], kept: dict[int, dict[int, set[int]]], persisted: int) -> None:
    ranks = [NOTHING if node is None else live(node[0], at=node[0] - node[1], wrote=bool(node[1])) for node in nodes]
    alive = {rank for rank, node in enumerate(nodes) if node is not None}
    replicas = {
        node: {rank: dict.fromkeys(its, "") for rank, its in ranks_.items() if rank != node and rank < len(ranks)}
        for node, ranks_ in kept.items()
        if node in alive
    }
    found = decided(ranks, replicas, persisted=(persisted, "there" if persisted >= 0 else ""))
    newest = min((node[0] for node in nodes if node is not None), default=-1)
    if found.action in ("in_place", "rewind"):
        assert found.target <= newest
        assert found.repeated_steps == (newest - found.target if found.action == "rewind" else 0)
        for rank, inventory in enumerate(ranks):
            sources = found.fetch.get(rank)
            assert found.target in inventory.tensors or (sources is not None and sources.travel_from)
            for node in sources.travel_from if sources else []:
                assert found.target in replicas[node][rank]
        if found.action == "in_place":
            assert all(inventory.at <= found.target for inventory in ranks)
        for step in range(newest, found.target, -1):
            somewhere = [
                step in inventory.tensors or any(step in its.get(rank, ()) for its in replicas.values())
                for rank, inventory in enumerate(ranks)
            ]
            assert not all(somewhere), "a newer step could have been restored"
    elif found.action == "storage":
        assert found.target == persisted >= 0
