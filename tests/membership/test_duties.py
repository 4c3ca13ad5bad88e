"""The leader's duties, by a model of etcd that carries out changes: whatever happens, in whatever order, and however old the view of who
acts, no recovery is planned twice or from half of the reports, and when things calm down the job goes on."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lightning_gemini.membership import generations
from lightning_gemini.membership.etcd_duties import Terms, duty, ending, follow, loss
from lightning_gemini.membership.etcd_keys import Change, node_key, number_key
from lightning_gemini.membership.etcd_view import View
from lightning_gemini.membership.records import Completed
from tests.membership.helpers import decide, info, report

PREFIX = "/lightning_gemini/model/"
TERMS = Terms(nnodes=3, join_timeout_s=10, vacancy_timeout_s=10, lease_ttl_s=4)
BACK = st.integers(0, 8)
"""How old the view of who acts is."""
_ENCODE = msgspec.msgpack.encode


class Model:
    """What etcd does with changes."""

    def __init__(self) -> None:
        self.revision = 1
        self.keys: dict[str, tuple[bytes, int]] = {}
        self.written: list[str] = []

    def make(self, change: Change) -> bool:
        if any(self.keys.get(key, (b"", 0))[1] != revision for key, revision in change.unchanged.items()):
            return False
        self.revision += 1
        for kind in ("reports", "plans", "completed", "recovered"):
            for key in [key for key in self.keys if key.startswith(f"{kind}/") and key < number_key(kind, max(change.forget_before, 0))]:
                del self.keys[key]
        for key in change.deletes:
            self.keys.pop(key, None)
        for key, value in change.puts.items():
            self.keys[key] = _ENCODE(value), self.revision
            self.written.append(key)
        return True

    def view(self) -> View:
        view = View(PREFIX)
        pairs = [
            {"key": b64encode((PREFIX + key).encode()).decode(), "value": b64encode(value).decode(), "mod_revision": str(revision)}
            for key, (value, revision) in self.keys.items()
        ]
        view.reset({"header": {"revision": str(self.revision), "cluster_id": "1"}, "kvs": pairs})
        return view


def formed(*nodes: str) -> Model:
    """A job that has formed."""
    etcd = Model()
    for node in nodes:
        etcd.make(Change(puts={node_key(node): info(node)}))
    change = duty(etcd.view(), TERMS, decide, waited_s=0, spent_s=0)
    assert change is not None and etcd.make(change)
    return etcd


class Job(RuleBasedStateMachine):
    """Agents come, go, fail and act on views that may be old."""

    def __init__(self) -> None:
        super().__init__()
        self.etcd = formed("a", "b", "c")
        self.views = [self.etcd.view()]
        self.born = 0
        self.newest = self.etcd.view().value("generation").generation

    def _seen(self, back: int) -> View:
        return self.views[max(0, len(self.views) - 1 - back)]

    def _make(self, change: Change | None) -> bool:
        made = change is not None and self.etcd.make(change)
        self.views.append(self.etcd.view())
        return made

    @rule(spare=st.booleans())
    @precondition(lambda self: len(self.etcd.view().nodes) < 6)
    def come(self, spare: bool) -> None:
        self.born += 1
        node = f"n{self.born}"
        self._make(Change(puts={node_key(node): info(node, spare=spare)}))

    @rule(which=st.integers(0, 5), back=BACK, how=st.sampled_from(["lease", "suspected"]))
    def go(self, which: int, back: int, how: str) -> None:
        nodes = list(self.etcd.view().nodes)
        if which < len(nodes):
            key = node_key(nodes[which])
            self._make(Change(puts={}, deletes=(key,)) if how == "lease" else loss(self._seen(back), nodes[which], "is gone", 0.0))

    @rule(back=BACK)
    def lead(self, back: int) -> None:
        self._make(duty(self._seen(back), TERMS, decide, waited_s=0, spent_s=0))

    @rule(back=BACK)
    def fault(self, back: int) -> None:
        view = self._seen(back)
        if view.formed is not None:
            self._make(follow(view, generations.after_fault(view.formed.generation, "a fault", 1, 0.0), view.formed.nodes))

    @rule(indices=st.sets(st.integers(0, 2), min_size=2))
    def several_work(self, indices: set[int]) -> None:
        for index in indices:
            self.work(index, 0)

    @rule(index=st.integers(0, 2), back=BACK)
    def work(self, index: int, back: int) -> None:
        """A member reports, or completes, as its agent would in the generation that it sees."""
        view = self._seen(back)
        if view.formed is None or view.formed.generation.roster[index] not in self.etcd.view().nodes:
            return
        number = view.formed.generation.number
        if view.plan(number) is None:
            self._make(Change(puts={number_key("reports", number, index): report(number, index)}))
        else:
            done = Completed(number=number, index=index, restored_s=1, regrouped_s=1, resumed_s=1)
            self._make(Change(puts={number_key("completed", number, index): done}))

    @invariant()
    def decisions_are_made_once(self) -> None:
        for kind in ("plans", "recovered", "ending"):
            made = [key for key in self.etcd.written if key.startswith(kind)]
            assert len(made) == len(set(made))
        for plan in (view.plan(view.formed.generation.number) for view in self.views[-1:] if view.formed):
            assert plan is None or plan.reason.startswith("[0, 1, 2]"), "made from all reports"
        for outcome in self.views[-1].outcomes():
            assert len(self.views[-1].completed(outcome.number)) == 3

    @invariant()
    def numbers_only_grow(self) -> None:
        found = self.etcd.view().value("generation")
        old, self.newest = self.newest, found.generation
        assert old.number <= self.newest.number <= old.number + 1
        if old.number == self.newest.number:
            assert all(new == node for node, new in zip(old.roster, self.newest.roster, strict=True) if node), "only filled"
        placed = [node for node in self.newest.roster if node]
        assert len(placed) == len(set(placed)) and set(placed) == set(found.nodes)

    def teardown(self) -> None:
        """Calm: enough nodes are there, they do their work, and somebody leads."""
        while sum(not one.spare for one in self.etcd.view().nodes.values()) < 3:
            self.come(False)
        self.fault(0)
        for _ in range(20):
            self.lead(0)
            for index in range(3):
                self.work(index, 0)
            self.decisions_are_made_once()
        view = self.etcd.view()
        assert view.formed is not None and set(view.formed.generation.roster) <= set(view.nodes)
        number = view.formed.generation.number
        assert number == 0 or view.outcomes()[-1].number == number
        for index in range(3):
            self._make(Change(puts={f"finished/{index}": number}))
        self.lead(0)
        assert self.etcd.view().ending is not None


TestJob = Job.TestCase
TestJob.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("gone, waited_s, status", [((), 99, None), (("c",), 9, None), (("c",), 10, 1)])
def test_a_vacancy_ends_the_job_in_time(gone: tuple[str, ...], waited_s: float, status: int | None) -> None:
    etcd = formed("a", "b", "c")
    for node in gone:
        assert etcd.make(loss(etcd.view(), node, "is gone", 0.0))
    change = duty(etcd.view(), TERMS, decide, waited_s=waited_s, spent_s=0)
    assert (change.puts["ending"].status if change else None) == status


def test_nothing_follows_an_ending() -> None:
    etcd = formed("a", "b", "c")
    etcd.make(ending(etcd.view(), 3, "enough"))
    assert not etcd.make(ending(etcd.view(), 4, "late"))
    etcd.make(Change(puts={}, deletes=(node_key("a"),)))
    assert duty(etcd.view(), TERMS, decide, waited_s=99, spent_s=0) is None


def test_of_older_generations_only_one_is_kept() -> None:
    """So that whoever looks late still hears how the last one ended, and etcd does not fill up."""
    etcd = formed("a", "b", "c")
    for number in range(1, 5):
        view = etcd.view()
        assert view.formed is not None
        assert etcd.make(follow(view, generations.after_fault(view.formed.generation, "a fault", 1, 0.0), view.formed.nodes))
        etcd.make(Change(puts={number_key("reports", number, 0): report(number, 0), number_key("plans", number): "any"}))
    assert {int(key.split("/")[1]) for key in etcd.keys if key[:5] in ("repor", "plans")} == {3, 4}


def test_what_a_loss_is_said_to_have_cost() -> None:
    """Until somebody knows better, as long as a lease lives; in a recovery, all of it until now."""
    for spent_s, detect_s in ((0.0, 4), (7.5, 7.5)):
        etcd = formed("a", "b", "c")
        etcd.make(Change(puts={}, deletes=(node_key("b"),)))
        change: Any = duty(etcd.view(), TERMS, decide, waited_s=0, spent_s=spent_s)
        generation = change.puts["generation"].generation
        assert generation.detect_s == detect_s and generation.reason == "node b (127.0.0.1) at index 1 is gone"


def test_records_of_another_version_are_as_good_as_absent() -> None:
    etcd = formed("a", "b", "c")
    etcd.keys["nodes/x"] = (b"\xc1 no record", 9)
    etcd.keys["something/else"] = (_ENCODE(1), 9)
    assert set(etcd.view().nodes) == {"a", "b", "c"} and etcd.view().held("something/else") is None
