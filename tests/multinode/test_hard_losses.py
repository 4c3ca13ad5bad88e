"""Losses that come together, one after the other, or in the middle of a recovery; and what is left when nothing can be recovered."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.multinode.lab import Lab, until
from tests.multinode.models import Recipe, Strike
from tests.support.cluster import JobOnNodes

DDP, FSDP, SMALL = Recipe("ddp", 4), Recipe("fsdp", 4), Recipe("fsdp", 2)
THREE, FOUR = Recipe("fsdp", 3), Recipe("fsdp", 4, steps=3)


def held(job: JobOnNodes, number: int = 0) -> None:
    """A rank waits for its end at a strike."""
    job.until(lambda: (job.directory / f"struck-{number}").exists(), "a strike")


def kill(*nodes: int) -> Callable[[JobOnNodes], None]:
    """While the first strike holds its rank."""

    def during(job: JobOnNodes) -> None:
        held(job)
        for node in nodes:
            job.kill(node)

    return during


@pytest.mark.parametrize("step", [0, 1, 5])
@pytest.mark.parametrize("recipe", [Recipe("ddp", 2), SMALL], ids=["ddp", "fsdp"])
def test_a_node_is_lost_before_its_newest_snapshot_is_replicated(lab: Lab, recipe: Recipe, step: int) -> None:
    """Steps may be computed again, few and told; in step 0 nothing may be there to go back to, then all begin anew."""
    job = lab.run(recipe, 2, Strike("forward", 1, step), spares=1)
    restarted = any(event["action"] == "restart" for event in job.named("plan"))
    assert not restarted or step == 0
    told = sum(event["repeated_steps"] for event in job.named_of(0, "plan"))
    assert told <= 2
    lab.same(recipe, job, recoveries=0 if restarted else 1, repeated=told, lost=[1], replaced=[0, 1] if restarted else [1])


@pytest.mark.parametrize("where", ["setup", "sanity", "train_start"])
def test_a_node_is_lost_before_the_first_boundary(lab: Lab, where: str) -> None:
    """Nothing is lost: all begin anew."""
    job = lab.run(DDP, 2, Strike(where, 0, 0), spares=1)
    assert [event["action"] for event in job.named_of(1, "plan")] == ["restart"]
    lab.same(DDP, job, lost=[0], replaced=job.pids().keys())


@pytest.mark.parametrize("where", ["train_end", "fit_end"])
def test_a_node_is_lost_after_the_last_step(lab: Lab, where: str) -> None:
    job = lab.run(DDP, 2, Strike(where, 3, 8, kept=True), spares=1)
    lab.same(DDP, job, recoveries=1, lost=[1], replaced=[2, 3])


def test_the_leader_of_the_membership_is_lost(lab: Lab) -> None:
    leaders: list[int] = []

    def during(job: JobOnNodes) -> None:
        held(job)
        leaders.append(lab.leader(job))
        job.kill(leaders[0])
        (job.directory / "go").touch()

    job = lab.run(THREE, 3, Strike("forward", 0, 3, "wait", kept=True), spares=1, during=during)
    ranks = [leader for leader in leaders if leader < 3]  # it may be the spare
    lab.same(THREE, job, recoveries=len(ranks), lost=leaders, replaced=ranks)


def test_two_nodes_of_different_groups_are_lost_at_once(lab: Lab) -> None:
    job = lab.run(FOUR, 4, Strike("forward", 0, 3, "wait", kept=True), spares=2, during=kill(0, 2))
    lab.same(FOUR, job, recoveries=1, lost=[0, 2], replaced=[0, 2])


def test_one_node_after_the_other_is_lost(lab: Lab) -> None:
    """The second one is the spare that took the first one's place; the third had sent it its snapshots."""
    strikes = Strike("forward", 0, 2, kept=True), Strike("forward", 0, 4, kept=True), Strike("optimizer", 1, 6)
    job = lab.run(SMALL, 2, *strikes, spares=3)
    first = next(number for number in (2, 3, 4) if job.named_of(number, "assign"))
    assert len(job.recoveries) == 3 and job.statuses[first]
    lab.same(SMALL, job, recoveries=3, lost=[0, 1, first], replaced=[0, 1])
    assert len(job.pids()[0]) == 3 and len(job.pids()[1]) == 2


def test_a_spare_node_is_lost_while_it_sets_up(lab: Lab) -> None:
    strikes = Strike("forward", 0, 3, kept=True), Strike("setup", 0, 0, after="struck-0")
    job = lab.run(SMALL, 2, *strikes, spares=2)
    lost = {number for number, status in job.statuses.items() if status}
    assert len(lost) == 2 and 0 in lost and 1 not in lost
    lab.same(SMALL, job, recoveries=1, lost=lost, replaced=[0])


def test_a_spare_node_is_lost_while_it_fetches(lab: Lab) -> None:
    def during(job: JobOnNodes) -> None:
        held(job)
        job.kill(0)
        job.until(lambda: bool(job.named_of(2, "plan") or job.named_of(3, "plan")), "a plan")
        job.kill(2 if job.named_of(2, "plan") else 3)

    job = lab.run(SMALL, 2, Strike("forward", 0, 3, "wait", kept=True), spares=2, during=during)
    lost = {number for number, status in job.statuses.items() if status}
    assert len(lost) == 2 and 0 in lost and 1 not in lost
    lab.same(SMALL, job, recoveries=1, lost=lost, replaced=[0])


def test_a_spare_of_another_domain_makes_other_groups(lab: Lab) -> None:
    """What was kept by the old ones is still there when it is needed."""
    job = lab.run(FOUR, 4, Strike("forward", 0, 3, kept=True), spares=1, domains="aabbb")
    lab.same(FOUR, job, recoveries=1, lost=[0], replaced=[0])
    keepers = {event["node"] for event in job.named_of(4, "replicated")}
    assert keepers == {1}, "the groups were meant to change"


def test_a_healthy_node_is_lost_when_a_new_one_has_fetched(lab: Lab) -> None:
    """What was fetched is enough for the next recovery, although nobody has landed on it."""

    def during(job: JobOnNodes) -> None:
        kill(0)(job)
        held(job, 1)
        job.kill(1)
        job.until(lambda: any(event["generation"] == 2 for event in job.named_of(2, "plan")), "the next plan")
        (job.directory / "go").touch()

    strikes = Strike("forward", 0, 3, "wait", kept=True), Strike("train_start", 0, 2, "wait", after="struck-0")
    job = lab.run(THREE, 3, *strikes, spares=2, during=during, replication={"copies": 3})
    assert [event["action"] for event in job.named_of(2, "plan")] == ["in_place", "in_place"]
    lab.same(THREE, job, recoveries=1, lost=[0, 1], replaced=[0, 1])


@pytest.mark.parametrize("event", ["recover", "plan"])
def test_a_healthy_node_is_lost_in_a_recovery(lab: Lab, event: str) -> None:
    def during(job: JobOnNodes) -> None:
        kill(0)(job)
        job.until(lambda: bool(job.named_of(1, event)), event)
        job.kill(1)

    strike = Strike("forward", 0, 3, "wait", kept=True)
    job = lab.run(THREE, 3, strike, spares=2, during=during, replication={"copies": 3})
    lab.same(THREE, job, recoveries=1, lost=[0, 1], replaced=[0, 1])


def test_an_idle_spare_is_lost(lab: Lab) -> None:
    """Nobody minds, and another is taken later."""

    def during(job: JobOnNodes) -> None:
        job.until(lambda: len(job.named_of(2, "spare_ready")) == 2, "a spare")
        job.kill(2)

    job = lab.run(DDP, 2, Strike("forward", 1, 7, kept=True), spares=2, during=during)
    lab.same(DDP, job, recoveries=1, lost=[0, 2], replaced=[0, 1])


def test_only_an_agent_is_lost(lab: Lab) -> None:
    """Its ranks end by themselves."""
    job = lab.run(FSDP, 2, Strike("forward", 0, 3, "agent", kept=True), spares=1)
    assert "nothing is left behind" in job.output(0)
    lab.same(FSDP, job, recoveries=1, lost=[0], replaced=[0, 1])


def test_a_whole_group_is_lost(lab: Lab) -> None:
    """Its shards are nowhere."""
    job = lab.run(FOUR, 4, Strike("forward", 0, 3, "wait", kept=True), spares=2, during=kill(0, 1))
    assert {job.statuses[node] for node in (2, 3, 4, 5)} == {1}, job.outputs()
    for node in (2, 3):
        assert "nothing to go back to" in job.output(node) and "3 completed steps are lost" in job.output(node), job.output(node)


def test_without_a_spare_the_job_waits_for_a_node(lab: Lab) -> None:
    def during(job: JobOnNodes) -> None:
        held(job)
        job.until(lambda: "waits for a node in place of index 0" in job.output(1), "the message")
        job.start(2)

    job = lab.run(SMALL, 2, Strike("forward", 0, 3, kept=True), during=during)
    lab.same(SMALL, job, recoveries=1, lost=[0], replaced=[0])


def test_nobody_takes_the_place_in_time(lab: Lab) -> None:
    job = lab.run(SMALL, 2, Strike("forward", 0, 3, kept=True), membership={"vacancy_timeout_s": 1.0})
    assert job.statuses == {0: -9, 1: 1}
    assert job.output(1).count("membership.vacancy_timeout_s") == 1 and "index 0 after 1 s" in job.output(1), job.output(1)


def test_a_node_is_lost_in_a_network_that_is_waited_for(lab: Lab) -> None:
    """`when_behind: wait`: each step waits for the snapshot before it."""
    job = lab.run(SMALL, 2, Strike("before_step", 0, 5), spares=1, replication={"when_behind": "wait"})
    lab.same(SMALL, job, recoveries=1, repeated=range(2), lost=[0], replaced=[0])


def test_a_second_node_is_lost_before_the_processes_of_the_first_replacement_are_ready(lab: Lab) -> None:
    """The replacement takes part in two generations before its script has reached `fit`: its ranks are to be filled all the same."""
    recipe = Recipe("ddp", 3)

    def slow(train: Callable[[], None]) -> None:
        if not os.environ["LIGHTNING_GEMINI_RANK"]:  # a spare
            until(Path("go").exists, "the permission")
        train()

    def during(job: JobOnNodes) -> None:
        held(job)
        for generation, node in ((1, 1), (2, 2)):
            job.kill(node)
            job.until(lambda generation=generation: begun(job, generation), f"generation {generation}")  # type: ignore[misc]
        (job.directory / "go").touch()

    def begun(job: JobOnNodes, generation: int) -> bool:
        return any(event["generation"] == generation for event in job.named_of(0, "recover"))

    strike = Strike("forward", 0, 3, kind="wait", kept=True)
    job = lab.run(recipe, 3, strike, spares=2, wrapped=slow, during=during, replication={"copies": 3})
    lab.same(recipe, job, recoveries=1, lost=[1, 2], replaced=[1, 2])
