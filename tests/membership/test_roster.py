"""Rosters by tables and by properties: the same for everybody who computes them, nobody twice, nobody moved without need."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gemini.membership.records import NodeInfo
from lightning_gemini.membership.roster import agree, first, replaced
from tests.membership.helpers import info


def nodes(*infos: NodeInfo) -> dict[str, NodeInfo]:
    return {one.node: one for one in infos}


@pytest.mark.parametrize(
    "registered, count, roster",
    [
        ([], 1, None),
        ([info("b"), info("a")], 2, ["a", "b"]),
        ([info("a", host="10.0.0.10"), info("b", host="10.0.0.9")], 2, ["b", "a"]),
        ([info("a", host="fd00::1"), info("b", host="10.0.0.9")], 2, ["b", "a"]),
        ([info("a", preferred=1), info("b", preferred=0)], 2, ["b", "a"]),
        ([info("a", preferred=2), info("b"), info("c")], 3, ["b", "c", "a"]),
        ([info("a", preferred=1), info("b", preferred=1)], 2, ["a", "b"]),
        ([info("a", preferred=7), info("b", preferred=0)], 2, ["b", "a"]),
        ([info("a"), info("s", spare=True)], 2, None),
        ([info("a"), info("s", spare=True)], 1, ["a"]),
        ([info("a"), info("b"), info("c", preferred=0)], 2, ["c", "a"]),
    ],
)
def test_the_first_roster(registered: list[NodeInfo], count: int, roster: list[str] | None) -> None:
    assert first(nodes(*registered), count) == roster
    assert first(nodes(*reversed(registered)), count) == roster


@pytest.mark.parametrize("field, value", [("ranks_per_node", 4), ("version", 9), ("script", "other")])
def test_nodes_that_do_not_fit(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{field}=.* on node a \(127.0.0.1\) but {value!r} on node b \(127.0.0.1\): .* on every node"):
        first(nodes(info("a"), info("b", **{field: value})), 3)
    with pytest.raises(ValueError, match="node a .* node b"):
        agree(info("a"), info("b", **{field: value}))


KNOWN = nodes(info("a", domain="x"), info("b", domain="y"), info("c", domain="z"))


@pytest.mark.parametrize(
    "live, roster",
    [
        ([], ["a", "", "c"]),
        ([info("n")], ["a", "n", "c"]),
        ([info("n"), info("s", spare=True)], ["a", "s", "c"]),
        ([info("n", domain="y"), info("s", spare=True)], ["a", "n", "c"]),
        ([info("m", domain="x"), info("n", host="10.0.0.1")], ["a", "n", "c"]),
        ([info("n", ranks_per_node=3)], ["a", "", "c"]),
    ],
)
def test_who_comes_in_place_of_b(live: list[NodeInfo], roster: list[str]) -> None:
    assert replaced(["a", "b", "c"], nodes(KNOWN["a"], KNOWN["c"], *live), KNOWN) == roster


def test_a_spare_is_kept_for_its_own_failure_domain() -> None:
    live = nodes(KNOWN["c"], info("1", domain="y", spare=True), info("2", domain="q", spare=True))
    assert replaced(["a", "b", "c"], live, KNOWN) == ["2", "1", "c"]


def test_who_comes_again_waits_for_the_end_of_its_earlier_life() -> None:
    earlier, again = info("b", host="10.0.0.9"), info("b2", host="10.0.0.9", spare=True, again=True)
    known = {"a": info("a", host="10.0.0.8"), "b": earlier}
    assert replaced(["a", "b"], nodes(earlier, again), known) == ["", "b"]
    assert replaced(["a", "b"], nodes(known["a"], again), known) == ["a", "b2"]


def test_when_all_have_died_those_who_come_fit_each_other() -> None:
    live = nodes(info("m"), info("n", script="other"), info("o"))
    assert replaced(["a", "b", "c"], live, KNOWN) == ["m", "o", ""]


NAMES = st.sampled_from("abcdefghij")
INFOS = st.builds(
    info,
    NAMES,
    host=st.sampled_from(["10.0.0.1", "10.0.0.2", "10.0.0.10"]),
    domain=st.sampled_from(["", "x", "y"]),
    spare=st.booleans(),
    preferred=st.integers(-1, 4),
    script=st.sampled_from(["", "", "", "other"]),
)
NODES = st.dictionaries(NAMES, INFOS).map(lambda drawn: {name: info_ for name, info_ in drawn.items() if name == info_.node})


@given(NODES, st.integers(1, 5), st.randoms())
def test_properties_of_the_first(registered: dict[str, NodeInfo], count: int, random: Any) -> None:
    shuffled = list(registered.items())
    random.shuffle(shuffled)
    try:
        roster = first(registered, count)
    except ValueError:
        with pytest.raises(ValueError):
            first(dict(shuffled), count)
        return
    assert first(dict(shuffled), count) == roster
    willing = {name for name, one in registered.items() if not one.spare}
    assert (roster is None) == (len(willing) < count)
    if roster is not None:
        assert len(set(roster)) == count and set(roster) <= willing


@given(st.lists(NAMES | st.just(""), min_size=1, max_size=5, unique=True), NODES, NODES, st.randoms())
def test_properties_of_a_replacement(roster: list[str], live: dict[str, NodeInfo], known: dict[str, NodeInfo], random: Any) -> None:
    after = replaced(roster, live, known)
    shuffled = list(live.items())
    random.shuffle(shuffled)
    assert replaced(roster, dict(shuffled), known) == after
    assert replaced(after, live, known) == after, "it is done at once"
    placed = [node for node in after if node]
    assert len(set(placed)) == len(placed) and set(placed) <= set(live)
    assert all(new == old for old, new in zip(roster, after, strict=True) if old in live), "nobody is moved"
    if "" in after and placed:
        fits = [one for one in live.values() if one.script == live[placed[0]].script]
        assert {one.node for one in fits} <= set(after), "a place is vacant only if nobody is left for it"
