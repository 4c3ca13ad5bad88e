"""Which bytes each rank writes, and which of them travel: all bytes of a node, once, evenly; twins have the same."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gemini.state.catalogue import Entry, bytes_of
from lightning_gemini.state.ownership import Layout, Owned, owned, sharers
from tests.support.entries import entry

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.int64]
tensors = st.builds(
    lambda shape, dtype: torch.zeros(shape, dtype=dtype), st.lists(st.integers(0, 9), max_size=3).map(tuple), st.sampled_from(DTYPES)
)
kinds = st.lists(st.tuples(tensors, st.sampled_from(["all", "own", "replicas across nodes", "replicas on the node"])), max_size=8)


def holders(kind: str, rank: int, nodes: int, per_node: int) -> tuple[int, ...]:
    """Ranks with the same bytes: DDP, FSDP2, and HSDP in two orders."""
    if kind == "all":
        return tuple(range(nodes * per_node))
    if kind == "own":
        return (rank,)
    if kind == "replicas across nodes":
        return tuple(node * per_node + rank % per_node for node in range(nodes))
    first = rank // per_node * per_node
    return tuple(range(first, first + per_node))


def entries(found: list[tuple[torch.Tensor, str]], rank: int, nodes: int, per_node: int) -> list[Entry]:
    """The catalogue of a rank."""
    world = nodes * per_node
    return [entry(f"param/{i}", tensor, holders(kind, rank, nodes, per_node), world) for i, (tensor, kind) in enumerate(found)]


def job(found: list[tuple[torch.Tensor, str]], nodes: int, per_node: int, copies: int) -> dict[int, Owned]:
    """What each rank of a job writes."""
    world = nodes * per_node
    return {rank: owned(entries(found, rank, nodes, per_node), Layout(rank, world, per_node, copies)) for rank in range(world)}


def shards(*holders: tuple[int, ...]) -> list[Entry]:
    return [entry(f"param/{i}", torch.zeros(4), ranks, 8) for i, ranks in enumerate(holders)]


@pytest.mark.parametrize(
    ("entries", "rank", "donors", "sharing"),
    [
        (shards(tuple(range(8))), 1, (0, 2, 3), [0, 1, 2, 3]),  # DDP on two nodes of four
        (shards((1,), (1,)), 1, (), [1]),  # FSDP2
        (
            shards((1, 3, 5, 7), (0, 1, 2, 3, 4, 5, 6, 7)),
            1,
            (3,),
            [0, 1, 2, 3],
        ),  # tensor parallelism of two, and a norm that it leaves whole
        (shards((1, 3, 5, 7), (1,)), 1, (), [1, 3]),  # a distributed optimizer
        (shards((1, 3, 5, 7), (1, 5)), 1, (), [1, 3]),  # whose second instance is on the other node
        ([], 1, (), [1]),
    ],
)
def test_who_can_write_in_a_ranks_place_and_whose_snapshots_it_needs(
    entries: list[Entry], rank: int, donors: tuple[int, ...], sharing: list[int]
) -> None:
    layout = Layout(rank, 8, 4, 1)
    assert owned(entries, layout).donors == donors
    assert sharers(entries, layout) == sharing


shape = st.tuples(kinds, st.integers(1, 4), st.integers(1, 4), st.integers(1, 3)).filter(lambda s: s[3] <= s[1])


@given(shape)
@settings(max_examples=150, deadline=None)
def test_every_byte_that_a_node_holds_is_written_once_on_it(shape: tuple[list[tuple[torch.Tensor, str]], int, int, int]) -> None:
    found, nodes, per_node, copies = shape
    written = job(found, nodes, per_node, copies)
    for node in range(nodes):
        here = range(node * per_node, (node + 1) * per_node)
        covered: dict[tuple[str, str], list[int]] = {
            (e.name, e.shard): [0] * bytes_of(e) for rank in here for e in entries(found, rank, nodes, per_node)
        }
        for rank in here:
            for part, _ in written[rank].parts:
                for i in range(part.start, part.start + part.length):
                    covered[part.name, part.shard][i] += 1
        assert all(count == 1 for counts in covered.values() for count in counts)


@given(shape)
@settings(max_examples=150, deadline=None)
def test_what_does_not_travel_is_on_enough_nodes(shape: tuple[list[tuple[torch.Tensor, str]], int, int, int]) -> None:
    found, nodes, per_node, copies = shape
    twins: defaultdict[str, set[int]] = defaultdict(set)
    staying = {}
    for rank, its in job(found, nodes, per_node, copies).items():
        rest = [part for part, _ in its.parts[its.travelling :]]
        assert bool(rest) == bool(its.key)
        if its.key:
            assert staying.setdefault(its.key, rest) == rest
            twins[its.key].add(rank // per_node)
        assert nodes > 1 or not its.travelling
    assert nodes == 1 or all(len(where) >= copies for where in twins.values())


@pytest.mark.parametrize(("kind", "share"), [("all", 0.0), ("own", 1.0), ("replicas across nodes", 0.0), ("replicas on the node", 1.0)])
def test_only_what_too_few_nodes_hold_travels(kind: str, share: float) -> None:
    found = [(torch.zeros(100), kind), (torch.zeros(60), kind)]
    for its in job(found, 2, 2, 2).values():
        lengths = [part.length for part, _ in its.parts]
        assert sum(lengths[: its.travelling]) == share * sum(lengths)


@pytest.mark.parametrize("kind", ["all", "replicas on the node"])
def test_shares_on_a_node_differ_by_one_byte_at_most(kind: str) -> None:
    found = [(torch.zeros(7, dtype=torch.int8), kind), (torch.zeros(1000), kind), (torch.zeros(3), kind)]
    sizes = [sum(part.length for part, _ in its.parts) for its in job(found, 2, 3, 2).values()]
    assert max(sizes) - min(sizes) <= 1 and sum(sizes) == 2 * (7 + 4012)


def test_twins_write_the_same() -> None:
    found = [(torch.zeros(100), "replicas across nodes"), (torch.zeros(11), "all"), (torch.zeros(5), "own")]
    written = job(found, 3, 2, 2)
    assert written[0].key == written[2].key == written[4].key != written[1].key
    assert [part.name for part, _ in written[0].parts[written[0].travelling :]] in (["param/0"], ["param/0", "param/1"])
