"""Which nodes keep copies of whose shards: Algorithm 1 of Gemini (SOSP'23), across failure domains. Pure, no I/O, no torch.

Seam: `place(domains, copies) -> Placement`; every agent computes the same one from the same list. `recovery_probability` and `describe` say
what it survives. Failure: more copies than nodes, or none, raises `ValueError` that names the key.

Nodes form groups of `copies` that keep each other's shards. Where `copies` does not divide the number of nodes, the left-over nodes join
the last group, which is a *ring*: each node sends to the next copies - 1. So every node sends copies - 1 times and keeps as many foreign
copies. Without labels, or where consecutive nodes lie in different domains, groups are of consecutive nodes, as in the paper.

With N nodes, m > 1 copies, and n nodes in the largest domain, any placement with that balance has these limits, and this one reaches them:
    n <= N // m              all copies of every shard lie in m different domains. (A domain holds at most one copy of each of the N shards,
                             and n * m copies in all.) The ring takes in further groups where it has too few domains otherwise.
    n <= N - ceil(N / m)     no shard has all of its copies in one domain: any one domain may be lost.
    otherwise                n * m - N * (m - 1) nodes are *exposed*: the shards of at least so many are lost with the largest domain.
`Placement.shortfall` and `Placement.exposed` name the nodes that fall short of the first and of the second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import comb

Groups = list[list[int]]


@dataclass(frozen=True, slots=True)
class Placement:
    """Who keeps whose shards; nodes are indices of the roster."""

    copies: int
    """Of each shard, the local one included."""
    domains: tuple[str, ...]
    """Failure domain of each node; an empty label is a domain of its own."""
    groups: tuple[tuple[int, ...], ...]
    """Placement groups; one with more than `copies` nodes is a ring, in this order."""
    targets: tuple[tuple[int, ...], ...]
    """Node -> the copies - 1 nodes that it sends its shards to."""

    def holders(self, index: int) -> tuple[int, ...]:
        """The nodes that keep the shards of node `index`, itself first."""
        return (index, *self.targets[index])

    @property
    def shortfall(self) -> tuple[int, ...]:
        """Nodes whose copies lie in fewer than `copies` different domains."""
        return tuple(index for index, spread in enumerate(self._spreads()) if spread < self.copies)

    @property
    def exposed(self) -> tuple[int, ...]:
        """Nodes that have copies, but all in one domain: its loss loses their shards."""
        return tuple(index for index, spread in enumerate(self._spreads()) if spread == 1 < self.copies)

    def _spreads(self) -> Iterator[int]:
        labels = _labels(self.domains)
        return (len({labels[holder] for holder in self.holders(index)}) for index in range(len(labels)))


def place(domains: Sequence[str], copies: int) -> Placement:
    """Place `copies` of every node's shards.

    Args:
        domains: failure domain (rack, switch, zone) of each node, in the order of the roster; an empty text is a domain of its own.
        copies: of each shard, the local one included.

    Raises `ValueError` for more copies than nodes, and for less than one.
    """
    nodes = len(domains)
    if not 1 <= copies <= nodes:
        remedy = f"give 1 to {nodes}" if copies < 1 else f"give 1 to {nodes}, or start more nodes"
        raise ValueError(f"replication.copies={copies} is not valid: each copy lies on another node and the job has {nodes}: {remedy}")
    best: Placement | None = None
    for groups in _candidates(_labels(domains), copies):
        found = Placement(copies, tuple(domains), tuple(map(tuple, groups)), _targets(groups, nodes, copies))
        if best is None or _faults(found) < _faults(best):
            best = found
        if not best.shortfall:
            break
    assert best is not None
    return best


def _labels(domains: Sequence[str]) -> list[int]:
    """A number for each domain, by first appearance."""
    numbers: dict[str | int, int] = {}
    return [numbers.setdefault(domain or index, len(numbers)) for index, domain in enumerate(domains)]


def _targets(groups: Groups, nodes: int, copies: int) -> tuple[tuple[int, ...], ...]:
    targets: list[tuple[int, ...]] = [()] * nodes
    for group in groups:
        for at, index in enumerate(group):
            targets[index] = tuple(group[(at + step) % len(group)] for step in range(1, copies))
    return tuple(targets)


def _faults(placement: Placement) -> tuple[int, int]:
    return len(placement.exposed), len(placement.shortfall)


def _candidates(labels: list[int], copies: int) -> Iterator[Groups]:
    """Placements to choose from: the paper's own first, then one that is perfect if any is, then some that spread a too large domain."""
    nodes = range(len(labels))
    count, left = divmod(len(nodes), copies)
    whole = count - (left > 0)
    yield [list(nodes[i * copies : (i + 1) * copies]) for i in range(whole)] + ([list(nodes[whole * copies :])] if left else [])
    if not left:
        yield sorted(sorted(group) for group in _deal(nodes, labels, count))
        return
    sizes = Counter(labels).values()
    for rounds in range(1, count + 1):  # of the ring; it needs a domain's nodes in different rounds
        if sum(min(size, rounds) for size in sizes) >= rounds * copies + left:
            yield _with_ring(labels, copies, rounds)
            break
    yield _with_ring(labels, copies, 1)
    rounds = max(1, len(nodes) - max(sizes))  # each with one node that is not of the largest domain
    yield [sum(_deal(nodes, labels, rounds), [])]


def _deal(nodes: Sequence[int], labels: list[int], rounds: int) -> Groups:
    """Deal nodes out like cards, domain after domain, the largest first.

    A domain with up to `rounds` nodes has no two in one round (McNaughton's wrap-around rule). If the rounds, of at least m nodes each, are
    then put one after another into a ring, any m neighbours lie in m domains: a domain's next node comes in the same place of the next
    round; or, where the deal has wrapped within this domain, in the place after it, or a whole round later.
    """
    sizes = Counter(labels[index] for index in nodes)
    order = sorted(nodes, key=lambda index: (-sizes[labels[index]], labels[index], index))
    return [order[start::rounds] for start in range(rounds)]


def _with_ring(labels: list[int], copies: int, rounds: int) -> Groups:
    """Groups, and a ring of `rounds` times `copies` nodes and all that are left over."""
    count, left = divmod(len(labels), copies)
    chosen = _choose(labels, rounds * copies + left, rounds)
    others = [index for index in range(len(labels)) if index not in chosen]
    groups = _deal(others, labels, count - rounds) if count > rounds else []
    ring = sum(_deal(sorted(chosen), labels, rounds), [])
    return [*sorted(sorted(group) for group in groups), ring]


def _choose(labels: list[int], size: int, most: int) -> set[int]:
    """`size` nodes, up to `most` of each domain if that is enough, always of the one of which most are left."""
    remaining: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        remaining.setdefault(label, []).append(index)
    taken: Counter[int] = Counter()
    chosen: set[int] = set()
    while len(chosen) < size:
        label = min(remaining, key=lambda label: (not remaining[label], taken[label] // most, -len(remaining[label]), label))
        chosen.add(remaining[label].pop(0))
        taken[label] += 1
    return chosen


def recovery_probability(placement: Placement, lost: int) -> float:
    """The probability that every shard has a copy left when `lost` nodes fail at once, each set of so many being equally likely.

    Exact: sets are counted, not sampled. Raises `ValueError` for a number that is not between 0 and the number of nodes.
    """
    nodes = len(placement.targets)
    if not 0 <= lost <= nodes:
        raise ValueError(f"lost={lost} is not valid: give a number of nodes from 0 to {nodes}")
    ways = [1] + [0] * lost  # number of lost nodes -> sets that are survived, in the groups so far
    survived = {size: _survived(size, placement.copies, lost) for size in map(len, placement.groups)}
    for group in placement.groups:
        of_group = survived[len(group)]
        ways = [sum(ways[k - j] * of_group[j] for j in range(min(k, len(of_group) - 1) + 1)) for k in range(lost + 1)]
    return float(Fraction(ways[lost], comb(nodes, lost)))


def _survived(size: int, copies: int, most: int) -> list[int]:
    """For j = 0 … `most` lost nodes of a group: in how many ways no `copies` neighbours of its ring are among them.

    With z nodes left the runs of lost ones between them are z numbers below `copies` with sum j: inclusion and exclusion counts these, and
    the ring can be turned by `size` places, z of which begin at a node that is left. A plain group is a ring of `copies` nodes.
    """
    counts = []
    for left in range(size, max(0, size - most - 1), -1):
        excess = range(min(left, (size - left) // copies) + 1)
        runs = sum((-1) ** i * comb(left, i) * comb(size - 1 - i * copies, left - 1) for i in excess)
        counts.append(size * runs // left)
    return counts


def describe(placement: Placement) -> list[str]:
    """What it survives, as lines for the start-up banner; the second one is a warning."""
    copies, nodes = placement.copies, len(placement.targets)
    if copies == 1:
        return ["shards are kept on their own node only (replication.copies=1): a lost node is restored from storage"]
    apart = " of different failure domains" if any(placement.domains) and not placement.shortfall else ""
    line = f"copies on {copies} nodes{apart}; any {_plural(copies - 1, 'node')} may be lost"
    chances = {lost: recovery_probability(placement, lost) for lost in (copies, copies + 1) if lost <= nodes}
    said = [f"{lost}{' at once are survived' if lost == copies else ''} with {_percent(p)}" for lost, p in chances.items() if p]
    return ["; ".join([line, *([", ".join(said)] if said else [])]), *_warnings(placement)]


def _warnings(placement: Placement) -> list[str]:
    if not placement.shortfall:
        return []
    copies, nodes = placement.copies, len(placement.domains)
    name, size = Counter(domain for domain in placement.domains if domain).most_common(1)[0]
    what = f"{_plural(len(placement.shortfall), 'node')} with copies in fewer than {copies} failure domains"
    if placement.exposed:
        what = f"{_plural(len(placement.exposed), 'node')} with all copies in one failure domain, lost with it"
    return [f"{what}: {name!r} has {size} of the {nodes} nodes, have at most {nodes // copies} in each"]


def _plural(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"


def _percent(probability: float) -> str:
    """Never rounded up to certainty."""
    return "more than 99.99 %" if 0.9999 < probability < 1 else f"{100 * probability:.2f} %"
