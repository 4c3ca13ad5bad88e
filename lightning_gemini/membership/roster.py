"""Which node has which place in the job. Pure: the same nodes give the same roster, whoever computes it and in whatever order they came.

Seam: `agree` (may two nodes be in one job), `first` (the roster that forms the job), `replaced` (the roster after losses, or after somebody
came for a vacant place). What fails: nodes that cannot be in one job -> `ValueError` that names both, and what to change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from ipaddress import ip_address

from lightning_gemini.membership.records import NodeInfo

VACANT = ""
_SAME = {
    "ranks_per_node": "start the same number of ranks on every node",
    "version": "install the same version of lightning_gemini on every node",
    "token": "give every node the same secret, in LIGHTNING_GEMINI_TOKEN or --token-file",
    "script": "start the same command line, with the same version of lightning_gemini, on every node",
}


def agree(one: NodeInfo, other: NodeInfo) -> None:
    """Raises `ValueError` where two nodes cannot be in one job."""
    for field, remedy in _SAME.items():
        a, b = getattr(one, field), getattr(other, field)
        if a != b:
            raise ValueError(
                f"{field}={a!r} on node {one.node} ({one.host}) but {b!r} on node {other.node} ({other.host}): {remedy}, or give each job "
                "a name of its own"
            )


def first(nodes: Mapping[str, NodeInfo], nnodes: int) -> list[str] | None:
    """The roster that forms the job: node by index, or None while there are fewer than `nnodes`. A spare never is in it.

    A node has the place that its launcher gave it, if no other wants the same; the rest are in the order of their addresses. Raises
    `ValueError` where nodes do not agree.
    """
    willing = _in_order(info for info in nodes.values() if not info.spare)
    for info in willing[1:]:
        agree(willing[0], info)
    if len(willing) < nnodes:
        return None
    wanted = Counter(info.preferred for info in willing)
    roster = [VACANT] * nnodes
    for info in willing:
        if 0 <= info.preferred < nnodes and wanted[info.preferred] == 1:
            roster[info.preferred] = info.node
    rest = iter([info.node for info in willing if info.node not in roster])
    return [node or next(rest) for node in roster]


def replaced(roster: list[str], live: Mapping[str, NodeInfo], known: Mapping[str, NodeInfo]) -> list[str]:
    """The roster without its dead: in their places and in vacant ones are live nodes that have none, while there are any.

    Args:
        roster: node by index, as it was.
        live: all nodes that are registered.
        known: nodes of the roster as they had registered, for the failure domains of the dead.
    """
    kept = [node if node in live else VACANT for node in roster]
    free = _candidates(kept, live)
    for near in (True, False):  # a spare of the same failure domain first, so that none of them goes to another's place
        for index, node in enumerate(kept):
            domain = known[roster[index]].domain if roster[index] in known else ""
            found = next((info for info in free if not near or (domain and info.domain == domain)), None)
            if node == VACANT and found is not None:
                kept[index] = found.node
                free.remove(found)
    return kept


def _candidates(kept: list[str], live: Mapping[str, NodeInfo]) -> list[NodeInfo]:
    """Live nodes without a place that can be in one job with those that have one; spares before those that came too many. One that comes
    again waits until its earlier life, which still has a place, is gone: etcd extends leases when it was away itself."""
    taken = {live[node].host for node in kept if node}
    free = _in_order(info for node, info in live.items() if node not in kept and not (info.again and info.host in taken))
    reference = [live[node] for node in kept if node] + free
    return sorted((info for info in free if _agrees(reference[0], info)), key=lambda info: not info.spare)


def _agrees(one: NodeInfo, other: NodeInfo) -> bool:
    return all(getattr(one, field) == getattr(other, field) for field in _SAME)


def _in_order(nodes: Iterable[NodeInfo]) -> list[NodeInfo]:
    def key(info: NodeInfo) -> tuple[int, int, str]:
        address = ip_address(info.host)
        return address.version, int(address), info.node

    return sorted(nodes, key=key)
