"""The vote tree over simulated nodes: whatever the order of messages, everybody learns the minimum and the same decision."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gemini.agent.memory import step_of, tag
from lightning_gemini.agent.votes import FANOUT, Result, Votes, Words, children, parent


class Tree:
    """`count` nodes; each direction of a connection is a queue of which, as in the mesh, only the newest message may be delivered."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.random, self.count = random.Random(seed), count
        self.up: dict[int, deque[Words]] = {node: deque() for node in range(count)}
        self.down: dict[int, deque[Result]] = {node: deque() for node in range(count)}
        self.seen: list[list[Result]] = [[] for _ in range(count)]
        self.nodes = [Votes(node, count, self.up[node].append, self._sender(node), lambda word: word + 2) for node in range(count)]

    def _sender(self, node: int):  # type: ignore[no-untyped-def]
        def send(result: Result) -> None:
            self.seen[node].append(result)
            for child in children(node, self.count):
                self.down[child].append(result)

        return send

    def deliver(self) -> bool:
        """One message, the newest of a random queue; what is older is lost."""
        waiting = [(queue, node) for queue in (self.up, self.down) for node in range(self.count) if queue[node]]
        if not waiting:
            return False
        queue, node = self.random.choice(waiting)
        message = queue[node].pop()
        queue[node].clear()
        above = parent(node)
        if isinstance(message, Words):
            assert above is not None
            self.nodes[above].heard(node, message)
        else:
            self.nodes[node].told(message)
        return True

    def settle(self) -> None:
        while self.deliver():
            pass


@pytest.mark.parametrize("count", [1, 2, FANOUT, FANOUT + 1, FANOUT + 2, 100])
def test_every_node_but_the_root_has_one_parent(count: int) -> None:
    below = [child for node in range(count) for child in children(node, count)]
    assert sorted(below) == list(range(1, count))
    assert all(node in children(parent(node), count) for node in range(1, count))  # type: ignore[arg-type]


@given(st.integers(1, 30), st.integers(0, 1 << 20), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 5)), max_size=60))
@settings(max_examples=150, deadline=None)
def test_all_learn_the_minimum(count: int, seed: int, changes: list[tuple[int, int]]) -> None:
    tree, own = Tree(count, seed), [0] * count
    for node, more in changes:
        own[node % count] += more
        value = own[node % count]
        tree.nodes[node % count].own(Words(boundary=value, tensors=value + 1, gate=value, replicated=value))
        if tree.random.random() < 0.5:
            tree.deliver()
    tree.settle()
    if changes and min(own):
        assert {result.result.words.boundary for result in tree.nodes} == {min(own)}
        assert all([r.words.boundary for r in seen] == sorted(r.words.boundary for r in seen) for seen in tree.seen), "it never goes back"


@given(st.integers(1, 20), st.integers(0, 1 << 20), st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_all_take_the_same_decision_at_a_gate(count: int, seed: int, steps: int) -> None:
    """Replication moves on between a node's look and another's; what counts is what the root saw when the last had reached the gate."""
    tree = Tree(count, seed)
    for step in range(steps):
        order = list(range(count))
        tree.random.shuffle(order)
        for node in order:
            replicated = tag(1, tree.random.randint(0, step))
            tree.nodes[node].own(Words(gate=tag(1, step), replicated=replicated))
            for _ in range(tree.random.randint(0, 3)):
                tree.deliver()
        tree.settle()
        for node in range(count):
            tree.nodes[node].own(Words(gate=tag(1, step), replicated=tag(1, step)))
        tree.settle()
    decided: dict[int, set[int]] = {}
    for seen in tree.seen:
        for result in seen:
            if result.words.gate:
                decided.setdefault(step_of(result.words.gate), set()).add(result.replicated_at_gate)
    assert set(decided) >= {steps - 1}
    assert all(len(values) == 1 for values in decided.values())


@given(st.integers(2, 20), st.integers(0, 1 << 20))
@settings(max_examples=50, deadline=None)
def test_one_request_ends_all_after_the_same_step(count: int, seed: int) -> None:
    tree = Tree(count, seed)
    for node in range(count):
        tree.nodes[node].own(Words(boundary=tag(3, 7 + node % 2), end_at=int(node == count - 1)))
        tree.deliver()
    tree.settle()
    assert len({node.result.words.end_at for node in tree.nodes}) == 1
    assert step_of(tree.nodes[0].result.words.end_at) >= 2


def test_who_connects_again_hears_everything() -> None:
    tree = Tree(2)
    tree.nodes[0].own(Words(boundary=5))
    tree.nodes[1].own(Words(boundary=4))
    tree.up[1].clear()  # lost with the connection
    tree.nodes[1].repeat()
    tree.settle()
    assert tree.nodes[0].result.words.boundary == 4
    tree.down[1].clear()
    tree.nodes[0].repeat()
    tree.settle()
    assert tree.nodes[1].result.words.boundary == 4


def test_a_complete_checkpoint_is_told_to_all() -> None:
    tree = Tree(12)
    tree.nodes[0].completed(tag(2, 30))
    tree.settle()
    assert {node.result.complete for node in tree.nodes} == {tag(2, 30)}
