"""Properties of the all-gather's plan and of the tree, for any number of members."""

from __future__ import annotations

from math import ceil, log2

from hypothesis import given
from hypothesis import strategies as st

from lightning_gemini.peers import bruck

SIZES = st.integers(1, 300)


def hops_allowed(size: int) -> int:
    return ceil(log2(size))


def run(size: int) -> list[list[int]]:
    """Carry out the plan of all members, round by round."""
    plans = [bruck.rounds(rank, size) for rank in range(size)]
    blocks = [[rank] for rank in range(size)]
    for number in range(len(plans[0])):
        sent = {(rank, plans[rank][number].to): blocks[rank][: plans[rank][number].count] for rank in range(size)}
        for rank in range(size):
            step = plans[rank][number]
            arrived = sent.pop((step.source, rank))  # a KeyError: nobody sends what this member waits for
            assert len(arrived) == step.count
            blocks[rank] = blocks[rank] + arrived
        assert not sent, "something was sent that nobody takes"
    return blocks


@given(SIZES)
def test_every_member_ends_with_all_blocks_in_order(size: int) -> None:
    for rank, blocks in enumerate(run(size)):
        assert bruck.in_order(rank, blocks) == list(range(size))


@given(SIZES)
def test_there_are_log2_rounds_of_one_message_each(size: int) -> None:
    for rank in range(size):
        plan = bruck.rounds(rank, size)
        assert len(plan) == hops_allowed(size)
        assert len({step.to for step in plan}) == len(plan), "a member hears from another twice"
        assert all(rank not in (step.to, step.source) for step in plan)


@given(SIZES)
def test_senders_and_receivers_agree(size: int) -> None:
    plans = [bruck.rounds(rank, size) for rank in range(size)]
    for rank, plan in enumerate(plans):
        for number, step in enumerate(plan):
            assert plans[step.to][number].source == rank
            assert plans[step.source][number].to == rank
            assert plans[step.source][number].count == step.count


@given(SIZES)
def test_nothing_is_sent_twice(size: int) -> None:
    for rank in range(size):
        assert sum(step.count for step in bruck.rounds(rank, size)) == size - 1


@given(SIZES, st.data())
def test_everyone_reaches_the_root_in_log2_hops(size: int, data: st.DataObject) -> None:
    root = data.draw(st.integers(0, size - 1))
    for member in range(size):
        hops, at = 0, member
        while at != root:
            at, hops = bruck.parent(at, root, size), hops + 1
            assert 0 <= at < size
            assert hops <= hops_allowed(size), "a cycle, or a detour"


@given(SIZES, st.data())
def test_no_member_serves_more_than_log2_others(size: int, data: st.DataObject) -> None:
    root = data.draw(st.integers(0, size - 1))
    children = [0] * size
    for member in range(size):
        if member != root:
            children[bruck.parent(member, root, size)] += 1
    assert max(children) <= hops_allowed(size)
    assert sum(children) == size - 1
