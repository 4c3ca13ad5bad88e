"""Placement of copies: the paper's figures, what is possible with failure domains, and counts against all sets of lost nodes."""

from __future__ import annotations

import time
from collections import Counter
from itertools import combinations, permutations
from math import ceil, comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gemini.placement import Placement, describe, place, recovery_probability


def plain(nodes: int, copies: int) -> Placement:
    """Without labels."""
    return place([""] * nodes, copies)


def racks(*sizes: int) -> list[str]:
    """Labels of nodes, rack after rack."""
    return [f"rack{rack}" for rack, size in enumerate(sizes) for _ in range(size)]


def ring(nodes: int, copies: int) -> Placement:
    """All nodes in one ring: the placement that the paper compares with."""
    targets = tuple(tuple((index + step) % nodes for step in range(1, copies)) for index in range(nodes))
    return Placement(copies, ("",) * nodes, (tuple(range(nodes)),), targets)


def is_survived(placement: Placement, lost: set[int]) -> bool:
    return all(not lost.issuperset(placement.holders(index)) for index in lost)


def enumerated(placement: Placement, lost: int) -> float:
    nodes = len(placement.targets)
    return sum(is_survived(placement, set(gone)) for gone in combinations(range(nodes), lost)) / comb(nodes, lost)


# ---- the paper


def test_groups_of_consecutive_nodes() -> None:
    placement = plain(6, 3)
    assert placement.groups == ((0, 1, 2), (3, 4, 5))
    assert placement.targets[0] == (1, 2) and placement.targets[5] == (3, 4)
    assert placement.holders(4) == (4, 5, 3)


def test_left_over_nodes_make_the_last_group_a_ring() -> None:
    placement = plain(8, 3)
    assert placement.groups == ((0, 1, 2), (3, 4, 5, 6, 7))
    assert [placement.targets[index] for index in (3, 6, 7)] == [(4, 5), (7, 3), (3, 4)]
    assert plain(5, 3).groups == ((0, 1, 2, 3, 4),)


FIGURES = [  # nodes, copies, lost, percent, decimals that the source gives
    (16, 2, 2, 93.33, 2), (16, 2, 3, 80.00, 2), (16, 2, 4, 61.54, 2), (128, 2, 2, 99.21, 2), (128, 2, 3, 97.64, 2),
    (1000, 2, 2, 99.90, 2), (1000, 2, 3, 99.70, 2), (1000, 2, 4, 99.40, 2), (16, 3, 3, 98.57, 2), (16, 3, 4, 94.45, 2),
    (5, 2, 2, 60, 0), (7, 2, 2, 76.2, 1), (17, 2, 2, 92.65, 2), (17, 2, 3, 78.2, 1), (17, 3, 3, 98.68, 2),
]  # fmt: skip


@pytest.mark.parametrize(("nodes", "copies", "lost", "percent", "decimals"), FIGURES)
def test_known_probabilities(nodes: int, copies: int, lost: int, percent: float, decimals: int) -> None:
    assert round(100 * recovery_probability(plain(nodes, copies), lost), decimals) == percent


@pytest.mark.parametrize(("lost", "percent"), [(2, 86.67), (3, 62.86)])
def test_one_ring_of_all_is_worse_than_groups(lost: int, percent: float) -> None:
    assert round(100 * recovery_probability(ring(16, 2), lost), 2) == percent
    assert recovery_probability(ring(16, 2), lost) < recovery_probability(plain(16, 2), lost)


FATAL = {(5, 2): 4, (7, 2): 5, (17, 2): 10, (7, 3): 5, (8, 3): 6, (16, 3): 8, (17, 3): 9}


@pytest.mark.parametrize(("nodes", "copies"), FATAL)
def test_distinct_fatal_sets(nodes: int, copies: int) -> None:
    placement = plain(nodes, copies)
    assert len({frozenset(placement.holders(index)) for index in range(nodes)}) == FATAL[nodes, copies]
    assert recovery_probability(placement, copies) == pytest.approx(1 - FATAL[nodes, copies] / comb(nodes, copies), abs=1e-12)


@pytest.mark.parametrize(("nodes", "copies"), [(6, 2), (12, 3), (16, 2), (20, 4), (100, 2)])
def test_closed_form_of_equal_groups(nodes: int, copies: int) -> None:
    for lost in range(nodes + 1):
        terms = range(min(nodes, lost) // copies + 1)
        ways = sum((-1) ** j * comb(nodes // copies, j) * comb(nodes - j * copies, lost - j * copies) for j in terms)
        assert recovery_probability(plain(nodes, copies), lost) == pytest.approx(ways / comb(nodes, lost), abs=1e-12)


@pytest.mark.parametrize("copies", [2, 3, 4, 5])
@pytest.mark.parametrize("nodes", [5, 7, 9, 11, 17])
def test_within_the_papers_bound_of_the_best(nodes: int, copies: int) -> None:
    """No placement has fewer than ceil(N / m) fatal sets of size m."""
    best = 1 - ceil(nodes / copies) / comb(nodes, copies)
    assert best - recovery_probability(plain(nodes, copies), copies) <= (2 * copies - 3) / comb(nodes, copies) + 1e-12


# ---- probabilities of any placement, by enumeration


@pytest.mark.parametrize("copies", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("nodes", [1, 2, 3, 5, 6, 7, 8, 9, 11, 12])
def test_every_probability_is_that_of_all_sets(nodes: int, copies: int) -> None:
    if copies > nodes:
        return
    for placement in (plain(nodes, copies), ring(nodes, copies), place(racks(nodes // 2, nodes - nodes // 2), copies)):
        for lost in range(nodes + 1):
            assert recovery_probability(placement, lost) == pytest.approx(enumerated(placement, lost), abs=1e-12)


def test_no_recovery_with_one_copy_and_none_of_nobody() -> None:
    assert [recovery_probability(plain(4, 1), lost) for lost in range(5)] == [1, 0, 0, 0, 0]
    assert recovery_probability(plain(4, 2), 4) == 0


@pytest.mark.parametrize("lost", [-1, 5])
def test_more_lost_nodes_than_there_are(lost: int) -> None:
    with pytest.raises(ValueError, match=rf"lost={lost} is not valid: give a number of nodes from 0 to 4"):
        recovery_probability(plain(4, 2), lost)


def test_large_jobs_are_counted_quickly() -> None:
    """Limits far above what it takes, far below what enumeration would take."""
    begin = time.process_time()
    assert 0 < recovery_probability(plain(1001, 3), 4) < 1
    assert 0 <= recovery_probability(plain(1000, 2), 500) < 1e-12
    assert not place(racks(*[20] * 50), 3).shortfall
    assert place(racks(600, 200, 201), 3).shortfall
    assert time.process_time() - begin < 20


# ---- failure domains


def test_groups_lie_across_racks() -> None:
    placement = place(racks(4, 4), 2)
    assert placement.groups == ((0, 4), (1, 5), (2, 6), (3, 7)) and not placement.shortfall


def test_nodes_in_a_good_order_keep_it() -> None:
    assert place(["a", "b", "b", "a", "c", "a"], 2).groups == ((0, 1), (2, 3), (4, 5))


def test_a_ring_takes_in_a_group_where_it_has_too_few_racks() -> None:
    """20 nodes, 3 copies: the paper's ring of 5 cannot lie in 5 racks where there are 4."""
    placement = place(racks(5, 5, 5, 5), 3)
    assert [len(group) for group in placement.groups] == [3, 3, 3, 3, 8] and not placement.shortfall


def test_the_ring_does_not_grow_without_need() -> None:
    assert [len(group) for group in place(racks(2, 2, 2, 1), 3).groups] == [3, 4]


@pytest.mark.parametrize(("sizes", "copies", "short"), [((7, 7, 6), 3, 4), ((6, 5), 2, 1), ((8, 5), 2, 3), ((12, 11, 10, 8), 4, 11)])
def test_a_domain_that_is_a_little_too_large(sizes: tuple[int, ...], copies: int, short: int) -> None:
    """Few nodes fall short, and the loss of nodes anywhere is survived as often as without domains: the ring stays small."""
    placement = place(racks(*sizes), copies)
    assert len(placement.shortfall) == short
    assert recovery_probability(placement, copies) == recovery_probability(plain(sum(sizes), copies), copies)


def test_nodes_without_a_label_are_domains_of_their_own() -> None:
    assert not place(["a", "a", "", ""], 2).shortfall
    assert place(["a", "a", "a", ""], 2).exposed


def partitions(number: int, most: int) -> list[tuple[int, ...]]:
    if not number:
        return [()]
    return [(part, *rest) for part in range(min(number, most), 0, -1) for rest in partitions(number - part, part)]


@pytest.mark.parametrize("copies", [1, 2, 3, 4, 5])
def test_every_division_into_domains_is_placed_as_well_as_can_be(copies: int) -> None:
    """The limits that the module's docstring gives, for all sizes of domains of up to 14 nodes."""
    for nodes in range(copies, 15):
        for sizes in [order for parts in partitions(nodes, nodes) for order in (parts, parts[::-1])]:
            placement, largest = place(racks(*sizes), copies), max(sizes)
            assert bool(placement.shortfall) == (largest > nodes // copies and copies > 1), sizes
            least = max(0, largest * copies - nodes * (copies - 1)) if copies > 1 else 0
            assert len(placement.exposed) == least, sizes
            assert (least == 0) == (largest <= nodes - ceil(nodes / copies) or copies == 1), sizes
            if not placement.shortfall:
                assert sum(len(group) > copies for group in placement.groups) == bool(nodes % copies)


@pytest.mark.parametrize(
    ("sizes", "copies"), [((3, 1), 2), ((3, 2), 2), ((4, 2), 2), ((3, 1, 1), 2), ((4, 1, 1), 2), ((3, 1), 3), ((3, 2), 3), ((4, 1), 3)]
)
def test_no_balanced_placement_does_better(sizes: tuple[int, ...], copies: int) -> None:
    """Against all ways in which each node could send to, and keep the shards of, copies - 1 others."""
    nodes, domains = range(sum(sizes)), tuple(racks(*sizes))
    ways = [way for way in permutations(nodes) if all(to != index for index, to in enumerate(way))]
    tried = [
        Placement(copies, domains, (), targets)
        for chosen in combinations(ways, copies - 1)
        for targets in [tuple(zip(*chosen, strict=True))]
        if all(len(set(to)) == copies - 1 for to in targets)
    ]
    assert len(tried) > 1
    assert len(place(domains, copies).exposed) == min(len(placement.exposed) for placement in tried)


# ---- properties

labels = st.lists(st.sampled_from(["", *"abcdef"]), min_size=1, max_size=24)
jobs = labels.flatmap(lambda domains: st.tuples(st.just(domains), st.integers(1, min(6, len(domains)))))


@given(job=jobs)
@settings(max_examples=300, deadline=None)
def test_every_shard_has_its_copies_and_every_node_its_load(job: tuple[list[str], int]) -> None:
    domains, copies = job
    placement = place(domains, copies)
    nodes = range(len(domains))
    assert sorted(index for group in placement.groups for index in group) == list(nodes)
    assert all(len(set(placement.holders(index))) == copies and placement.holders(index)[0] == index for index in nodes)
    kept = Counter(target for targets in placement.targets for target in targets)
    assert all(kept[index] == copies - 1 for index in nodes)
    for group in placement.groups:
        assert all(set(placement.holders(index)) <= set(group) for index in group)


@given(job=jobs)
@settings(max_examples=300, deadline=None)
def test_distinct_domains_when_that_is_possible(job: tuple[list[str], int]) -> None:
    domains, copies = job
    placement = place(domains, copies)
    largest = max(Counter(domain or index for index, domain in enumerate(domains)).values())
    assert bool(placement.shortfall) == (copies > 1 and largest > len(domains) // copies)
    for index in set(range(len(domains))) - set(placement.shortfall):
        assert len({domains[holder] or holder for holder in placement.holders(index)}) == copies


@given(job=jobs)
@settings(max_examples=100, deadline=None)
def test_names_of_domains_do_not_matter_and_all_agents_agree(job: tuple[list[str], int]) -> None:
    domains, copies = job
    assert place(domains, copies) == place(tuple(domains), copies)
    renamed = place([domain and f"z{'fedcba'.index(domain)}" for domain in domains], copies)
    assert renamed.groups == place(domains, copies).groups


@given(nodes=st.integers(1, 40), copies=st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_distinct_domains_are_the_papers_algorithm(nodes: int, copies: int) -> None:
    if copies <= nodes:
        assert place([f"rack{index}" for index in range(nodes)], copies).groups == plain(nodes, copies).groups
        whole = max(0, nodes // copies - bool(nodes % copies))
        groups = [tuple(range(i * copies, (i + 1) * copies)) for i in range(whole)]
        assert list(plain(nodes, copies).groups) == groups + [tuple(range(whole * copies, nodes))] * (whole * copies < nodes)


# ---- what is refused, and what is said


@pytest.mark.parametrize(
    ("nodes", "copies", "message"),
    [
        (2, 3, r"replication\.copies=3 is not valid: each copy lies on another node and the job has 2: give 1 to 2, or start more nodes"),
        (4, 0, r"replication\.copies=0 is not valid: .* the job has 4: give 1 to 4$"),
        (4, -1, r"replication\.copies=-1 is not valid"),
    ],
)
def test_copies_that_do_not_fit(nodes: int, copies: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plain(nodes, copies)


@pytest.mark.parametrize(
    ("placement", "lines"),
    [
        (plain(16, 2), ["copies on 2 nodes; any 1 node may be lost; 2 at once are survived with 93.33 %, 3 with 80.00 %"]),
        (plain(2, 2), ["copies on 2 nodes; any 1 node may be lost"]),
        (plain(3, 2), ["copies on 2 nodes; any 1 node may be lost"]),
        (plain(1000, 3), ["copies on 3 nodes; any 2 nodes may be lost; 3 at once are survived with more than 99.99 %, "
                          "4 with more than 99.99 %"]),
        (place(racks(2, 2), 2), ["copies on 2 nodes of different failure domains; any 1 node may be lost; "
                                 "2 at once are survived with 66.67 %"]),
        (plain(4, 1), ["shards are kept on their own node only (replication.copies=1): a lost node is restored from storage"]),
        (place(racks(4), 2), ["copies on 2 nodes; any 1 node may be lost; 2 at once are survived with 66.67 %",
                              "4 nodes with all copies in one failure domain, lost with it: 'rack0' has 4 of the 4 nodes, "
                              "have at most 2 in each"]),
        (place(racks(2, 1), 3), ["copies on 3 nodes; any 2 nodes may be lost",
                                 "3 nodes with copies in fewer than 3 failure domains: 'rack0' has 2 of the 3 nodes, "
                                 "have at most 1 in each"]),
    ],
)  # fmt: skip
def test_what_the_banner_says(placement: Placement, lines: list[str]) -> None:
    assert describe(placement) == lines
