"""What the leader of a job does next. Pure: it follows from what is in etcd and from how long something has been waited for.

Seam: `duty(view, …)` is one change to make now, or None. It is made only if what it follows from is still so, and the next duty follows
from the result. So a leader may die, be stopped or be replaced at any instruction: the next one finds either the change or the need for
it.

In order: form the job | replace the lost and fill vacant places | plan | account for a recovery | end the job. Nothing follows an ending. A
vacant place is filled under the same number: there can be no plan yet, and what the others have reported still holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from msgspec.structs import replace

from lightning_gemini.membership import generations, roster
from lightning_gemini.membership.base import Decide
from lightning_gemini.membership.etcd_keys import Change, Formed, node_key, number_key
from lightning_gemini.membership.etcd_view import View
from lightning_gemini.membership.records import Ending, Generation, NodeInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What the user has set."""

    nnodes: int
    join_timeout_s: float
    """For how long the job waits for its first nodes."""
    vacancy_timeout_s: float
    """For how long it waits for a node in place of a lost one."""
    lease_ttl_s: int
    """After which a node that says nothing is lost."""

    def __post_init__(self) -> None:
        for key in ("nnodes", "join_timeout_s", "vacancy_timeout_s", "lease_ttl_s"):
            value = getattr(self, key)
            if not value > 0:
                raise ValueError(f"membership.{key}={value!r} is not valid: give a number above 0")


def lacking(view: View, terms: Terms) -> str:
    """Which nodes the job waits for, in words; empty: none."""
    if view.ending is not None:
        return ""
    if view.formed is None:
        text = f"{sum(not info.spare for info in view.nodes.values())} of {terms.nnodes} nodes have registered"
        try:
            return text if roster.first(view.nodes, terms.nnodes) is None else ""
        except ValueError as error:
            return f"{text}; {error}"
    now = view.formed.generation
    vacant = [index for index, node in enumerate(now.roster) if node == roster.VACANT]
    return f"generation {now.number} waits for a node in place of index {', '.join(map(str, vacant))}" if vacant else ""


def duty(view: View, terms: Terms, decide: Decide, *, waited_s: float, spent_s: float) -> Change | None:
    """The leader's next change.

    Args:
        waited_s: for how long `lacking` has said something.
        spent_s: what the newest generation has cost so far, 0 when its recovery is complete.
    """
    if view.ending is not None:
        return None
    if view.formed is None:
        return _form(view, terms) or _give_up(view, terms, waited_s)
    now = view.formed.generation
    return (
        _replace(view, now, spent_s or terms.lease_ttl_s)
        or _fill(view, view.formed)
        or _give_up(view, terms, waited_s)
        or _plan(view, now, decide)
        or _account(view, now)
        or _finish(view, now)
    )


def ending(view: View, status: int, reason: str) -> Change:
    """End the job, unless it has ended."""
    return Change(puts={"ending": Ending(status=status, reason=reason)}, unchanged={"ending": 0})


def follow(view: View, now: Generation, nodes: Mapping[str, NodeInfo], *, deletes: tuple[str, ...] = ()) -> Change:
    """Begin generation `now`, whose nodes are among `nodes`. Of older ones, only the one before it is kept: some may not have read it
    yet."""
    formed = Formed(now, {node: nodes[node] for node in now.roster if node})
    unchanged = view.at("generation", *deletes)
    return Change(puts={"generation": formed}, unchanged=unchanged, deletes=deletes, forget_before=now.number - 1)


def loss(view: View, node: str, why: str, detect_s: float) -> Change:
    """Take a registered node out of the job. Afterwards nobody waits for its lease, also if it was the leader."""
    formed = view.formed
    keys = (node_key(node), "leader") if view.value("leader") == node else (node_key(node),)
    if formed is None or node not in formed.generation.roster:
        return Change(puts={}, unchanged=view.at(*keys), deletes=keys)
    live = {name: info for name, info in _present(view).items() if name != node}
    reason = f"{_name(formed, node)} {why}"
    following = generations.after_loss(formed.generation, roster.replaced(formed.generation.roster, live, formed.nodes), reason, detect_s)
    return follow(view, following, {**formed.nodes, **live}, deletes=keys)


def _form(view: View, terms: Terms) -> Change | None:
    try:
        places = roster.first(view.nodes, terms.nnodes)
    except ValueError:
        return None  # whoever came later is being told to leave
    return None if places is None else follow(view, Generation(number=0, roster=places), view.nodes)


def _give_up(view: View, terms: Terms, waited_s: float) -> Change | None:
    key = "join_timeout_s" if view.formed is None else "vacancy_timeout_s"
    limit_s, lack = getattr(terms, key), lacking(view, terms)
    if not lack or waited_s < limit_s:
        return None
    hosts = ", ".join(f"{info.node} ({info.host})" for info in view.nodes.values())
    return ending(view, 1, f"{lack} after {limit_s:g} s (membership.{key}); there: {hosts}. Start the missing ones, or allow more time")


def _present(view: View) -> dict[str, NodeInfo]:
    """Nodes that are no loss: those registered, and those whose ranks have ended well, whether they have left or not."""
    done: dict[str, NodeInfo] = {}
    if view.formed is not None:
        places = enumerate(view.formed.generation.roster)
        done = {node: view.formed.nodes[node] for index, node in places if node and index in view.finished()}
    return {**done, **view.nodes}


def _replace(view: View, now: Generation, detect_s: float) -> Change | None:
    assert view.formed is not None
    present, known = _present(view), view.formed.nodes
    gone = [node for node in now.roster if node and node not in present]
    if not gone:
        return None
    reason = "; ".join(f"{_name(view.formed, node)} is gone" for node in gone)
    following = generations.after_loss(now, roster.replaced(now.roster, present, known), reason, detect_s)
    return follow(view, following, {**known, **present})


def _fill(view: View, formed: Formed) -> Change | None:
    now, present = formed.generation, _present(view)
    places = roster.replaced(now.roster, present, formed.nodes)
    return None if places == now.roster else follow(view, replace(now, roster=places), {**formed.nodes, **present})


def _plan(view: View, now: Generation, decide: Decide) -> Change | None:
    reports, key = view.reports(now.number), number_key("plans", now.number)
    if now.number == 0 or roster.VACANT in now.roster or len(reports) < len(now.roster) or view.plan(now.number) is not None:
        return None
    return Change(puts={key: decide(now, reports)}, unchanged=view.at(key, "generation"))


def _account(view: View, now: Generation) -> Change | None:
    plan, done, key = view.plan(now.number), view.completed(now.number), number_key("recovered", now.number)
    if plan is None or len(done) < len(now.roster) or view.value(key) is not None:
        return None
    summary = generations.outcome(now, plan, view.reports(now.number).values(), done.values())
    return Change(puts={key: summary}, unchanged=view.at(key, "generation"))


def _finish(view: View, now: Generation) -> Change | None:
    return ending(view, 0, "all nodes have finished") if view.finished() >= {*range(len(now.roster))} else None


def _name(formed: Formed, node: str) -> str:
    return f"node {node} ({formed.nodes[node].host}) at index {formed.generation.roster.index(node)}"
