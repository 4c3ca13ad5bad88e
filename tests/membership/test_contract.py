"""What an agent may rely on, whoever keeps the membership."""

from __future__ import annotations

import select
import threading
from collections.abc import Callable, Iterator

import pytest

from lightning_gemini.membership.base import Membership
from lightning_gemini.membership.etcd import EtcdMembership
from lightning_gemini.membership.local import LocalMembership
from lightning_gemini.membership.records import Completed, Ending
from tests.membership.helpers import Agent, at, decide, have, pump, report
from tests.support.etcd import Etcd

Make = Callable[[Agent], Membership]
PHASES = {"detect": 2.0, "abort": 0.25, "restore": 0.25, "regroup": 0.25, "resume": 1.0}


@pytest.fixture(params=["local", "etcd"])
def make(request: pytest.FixtureRequest, job: str) -> Make:
    """Of a job of one node."""
    if request.param == "local":
        return lambda agent: LocalMembership(decide, agent)
    etcd: Etcd = request.getfixturevalue("etcd")
    return lambda agent: EtcdMembership([etcd.url], job, 1, decide, agent)


@pytest.fixture
def agent(make: Make) -> Iterator[Agent]:
    """A member of generation 0, that does nothing by itself."""
    one = Agent("one", make, diligent=False)
    pump([one], at([one], 0))
    yield one
    one.membership.close()


def test_one_node_forms_the_job(agent: Agent) -> None:
    assert agent.of("generation") == [("generation", 0, ["one"], "")]
    assert agent.nodes["one"].ranks_per_node == 2


def test_a_recovery(agent: Agent) -> None:
    agent.membership.begin(0, "rank 1 died", step=7, detect_s=2.0)
    pump([agent], at([agent], 1))
    assert (agent.generation.reason, agent.generation.fault_step, agent.generation.faults) == ("rank 1 died", 7, 1)
    agent.membership.report(report(1, 0, step=7))
    pump([agent], have([agent], "plan"))
    assert agent.of("plan") == [("plan", 1, 7, "[0] rank 1 died")]
    agent.membership.completed(Completed(number=1, index=0, restored_s=0.5, regrouped_s=0.75, resumed_s=1.75))
    pump([agent], have([agent], "recovered"))
    assert agent.of("recovered") == [("recovered", 1, PHASES)]


def test_a_fault_is_counted_by_its_step_and_only_once(agent: Agent) -> None:
    for number, (step, faults) in enumerate([(7, 1), (7, 2), (8, 1)]):
        for _ in range(3):
            agent.membership.begin(number, "a fault", step=step)
        pump([agent], at([agent], number + 1))
        assert (agent.generation.number, agent.generation.faults) == (number + 1, faults)


def test_what_belongs_to_an_older_generation_is_of_no_use(agent: Agent) -> None:
    agent.membership.begin(0, "a fault", step=1)
    pump([agent], at([agent], 1))
    agent.membership.report(report(1, 0))
    agent.membership.begin(1, "another", step=1)
    pump([agent], at([agent], 2))
    agent.membership.report(report(1, 0))
    agent.membership.completed(Completed(number=1, index=0, restored_s=0, regrouped_s=0, resumed_s=0))
    agent.membership.begin(0, "late", step=1)
    agent.membership.report(report(2, 0))
    pump([agent], lambda: any(plan[1] == 2 for plan in agent.of("plan")))
    assert not agent.of("recovered") and agent.generation.number == 2


def test_callbacks_come_from_poll_alone_and_a_superseded_plan_never(agent: Agent) -> None:
    seen: list[threading.Thread] = []
    agent.on_event = lambda event: (seen.append(threading.current_thread()), agent.events.append(event))[0]  # type: ignore[func-returns-value]
    agent.membership.begin(0, "a fault", step=1)
    select.select([agent.membership], [], [], 10)
    pump([agent], at([agent], 1))
    agent.membership.report(report(1, 0))
    select.select([agent.membership], [], [], 10)  # the plan waits
    agent.membership.begin(1, "another", step=1)
    pump([agent], at([agent], 2))
    assert set(seen) == {threading.current_thread()}
    assert [event[1] for event in agent.of("plan")] in ([], [1]), agent.events
    order = [event[:2] for event in agent.events]
    assert order.index(("generation", 2)) == len(order) - 1


def test_the_job_ends_when_all_have_finished(agent: Agent) -> None:
    agent.membership.finished()
    pump([agent], have([agent], "ending"))
    assert agent.of("ending") == [("ending", 0, "all nodes have finished")]


def test_the_first_ending_counts_and_nothing_follows(agent: Agent) -> None:
    agent.membership.end(Ending(status=3, reason="too many faults"))
    agent.membership.end(Ending(status=4, reason="late"))
    pump([agent], have([agent], "ending"))
    agent.membership.begin(0, "late", step=1)
    agent.membership.finished()
    assert not select.select([agent.membership], [], [], 0.2)[0]
    agent.membership.poll()
    assert agent.events[-1] == ("ending", 3, "too many faults")


def test_closing_in_a_callback(agent: Agent) -> None:
    agent.on_event = lambda event: (agent.events.append(event), agent.membership.close())[0]  # type: ignore[func-returns-value]
    agent.membership.end(Ending(status=0, reason="done"))
    pump([agent], have([agent], "ending"))


def test_closing_twice_and_polling_without_need(make: Make) -> None:
    one = Agent("one", make, diligent=False)
    one.membership.poll()
    one.membership.suspect("nobody")
    one.membership.close()
    one.membership.close()
