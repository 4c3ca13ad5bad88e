"""The leader is killed again and again, at any moment of a recovery, and of the recovery from that: the job goes on, and all agree."""

from __future__ import annotations

import os
import random
import signal
import time
from base64 import b64decode, b64encode

import msgspec
import pytest

from tests.membership.conftest import Start
from tests.membership.helpers import Process, reached, watch
from tests.support.etcd import Etcd

ROUNDS = 20 if "GEMINI_CHAOS" in os.environ else 6


def leader_of(etcd: Etcd, job: str) -> str:
    """Its node; empty while nobody leads."""
    found = etcd.ask("kv/range", key=b64encode(f"/lightning_gemini/{job}/leader".encode()).decode()).get("kvs", [])
    return msgspec.msgpack.decode(b64decode(found[0]["value"]), type=str) if found else ""


def the_leader(etcd: Etcd, job: str, processes: list[Process]) -> Process:
    deadline = time.monotonic() + 10
    while True:
        name = leader_of(etcd, job)
        found = [process for process in processes if process.node == name]
        if found:
            return found[0]
        assert time.monotonic() < deadline


def agree(processes: list[Process]) -> None:
    """Nobody heard of another roster, plan or outcome of the same generation; each has one plan and one outcome."""
    for kind in ("generation", "plan", "recovered"):
        told: dict[int, list[object]] = {}
        for process in processes:
            numbers = [event[2] for event in process.of(kind)]
            assert numbers == sorted(numbers) and (kind == "generation" or len(set(numbers)) == len(numbers)), process.events
            for event in process.of(kind):
                if kind != "generation" or "" not in event[3]:
                    assert told.setdefault(event[2], event[3:]) == event[3:]
        assert told


@pytest.mark.timeout(150)
@pytest.mark.campaign(always=True)
def test_the_leader_is_killed_at_any_moment(start: Start, etcd: Etcd) -> None:
    seed = random.randrange(1 << 30)
    chance, began = random.Random(seed), time.monotonic()
    alive = [start.process(etcd, f"n{i:03}", 3, lease_ttl_s=2) for i in range(4)]
    watch(alive, reached(alive, "generation", 0))
    everybody, kills = list(alive), 0
    for number in range(ROUNDS):
        leader = the_leader(etcd, start.job, alive)
        chance.choice(alive).tell("begin", number)
        time.sleep(chance.uniform(0, 0.08))  # this is the fault: its moment
        leader.signal(signal.SIGKILL)
        kills += 1
        watch([leader], lambda leader=leader: leader.of("died"))  # type: ignore[misc]
        alive.remove(leader)
        newcomer = start.process(etcd, f"n{4 + number:03}", 3, lease_ttl_s=2)
        for process in alive if number % 4 else []:  # each fourth time it is left to the lease
            process.tell("suspect", leader.node)
        alive.append(newcomer)
        everybody.append(newcomer)
        watch(alive, lambda: all(process.of("joined") for process in alive))
        gone = leader.node
        watch(alive, lambda gone=gone: all(_recovered_without(process, gone) for process in alive if _is_in(process)))  # type: ignore[misc]
        assert not any(process.of("expelled") for process in alive), f"seed {seed}"
    agree(everybody)
    assert kills == ROUNDS and time.monotonic() - began < 120


def _is_in(process: Process) -> bool:
    generations = process.of("generation")
    return not generations or process.node in generations[-1][3]


def _recovered_without(process: Process, gone: str) -> bool:
    """Its newest generation has a full roster without the dead one, and is complete."""
    generations = process.of("generation")
    if not generations or gone in generations[-1][3] or "" in generations[-1][3]:
        return False
    newest = generations[-1][2]
    return newest == 0 or any(event[2] == newest for event in process.of("recovered"))
