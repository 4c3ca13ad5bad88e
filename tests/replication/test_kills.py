"""Processes that die in the middle of a transfer: whatever is listed is whole."""

from __future__ import annotations

import functools
import os
import uuid
from pathlib import Path

import pytest

from lightning_gemini.replication.fence import Peer
from lightning_gemini.snapshot.slots import PAGE, SlotFile
from tests.replication.helpers import LIMIT_S, Agent, Arena, Child, Hear, Tell, random_bytes, verified
from tests.support.peers import until

SIZE, CHUNK = 24 << 20, 1 << 20
pytestmark = pytest.mark.campaign(always=True)
ROUNDS = 25 if "GEMINI_CHAOS" in os.environ else 8


@functools.lru_cache(2)
def payload_of(step: int) -> bytes:
    """Different everywhere for each step, cheap to make."""
    return random_bytes(CHUNK, step) * (SIZE // CHUNK)


def test_a_sender_is_killed_in_mid_transfer(children: list[Child]) -> None:
    """Its replacement goes on; the receiver lists whole versions only, and never loses the last one."""
    job = f"test-{uuid.uuid4().hex}"

    def body(hear: Hear, tell: Tell) -> None:
        agent = Agent(job, hear())
        generation, port, node = hear().split()
        agent.exchange.open(int(generation), {0: agent.peer, 1: Peer(node, "127.0.0.1", int(port))}, 0)
        tell(agent.exchange.port)
        step = int(hear())
        arena = agent.arena(0, SIZE + (2 << 20))
        while True:
            arena.write(step, payload_of(step), chunk=CHUNK)
            agent.exchange.send(0, step, [1])
            tell(step)
            agent.until(lambda step=step: (0, step, 1) in agent.seen.replicated)  # type: ignore[misc]
            step = int(hear())

    children += [Child(body) for _ in range(ROUNDS)]
    receiver, torn, last = Agent(job, "receiver"), 0, -1
    try:
        for number, child in enumerate(children):
            child.tell(f"sender-{number}")
            child.tell(f"{number} {receiver.exchange.port} receiver")
            peer = Peer(f"sender-{number}", "127.0.0.1", int(child.hear()))
            receiver.exchange.open(number, {0: peer, 1: receiver.peer}, 1)
            for step in (2 * number, 2 * number + 1):
                child.tell(step)
                child.hear()
                if step % 2 == 0:
                    until(lambda step=step: step in receiver.exchange.replicas().get(0, []))  # type: ignore[misc]
                    last = step
            torn += _kill_when_begun(child, receiver, number)
            steps = receiver.exchange.replicas()[0]
            assert last in steps and max(steps) <= last + 1
            for step in steps:
                assert receiver.replica(0, step).endswith(payload_of(step))
    finally:
        receiver.close()
    assert torn > ROUNDS // 2, f"only {torn} of {ROUNDS} were in mid-transfer"


def _kill_when_begun(child: Child, receiver: Agent, number: int) -> bool:
    """Kill when a block of the newest step has arrived, another one in each round; True when it came before the commit."""
    step, block = 2 * number + 1, number * 5 % (SIZE // CHUNK - 2)
    expected = payload_of(step)[: CHUNK // 2]
    file = receiver.exchange._store._files[0]

    def arrived() -> bool:
        found = []
        for place in (0, 1):
            start = PAGE + place * file.capacity + block * CHUNK
            found.append(expected[:64] in file.memory[start : start + 4096 + 64])
        return any(found)

    until(arrived)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    until(lambda: not receiver.exchange._fence._open)
    return step not in receiver.exchange.replicas()[0]


def test_a_receiver_is_killed_in_mid_transfer(children: list[Child]) -> None:
    """Its memory, held on to through /proc, has the older version whole at that moment, and the sender goes on with others."""
    job = f"test-{uuid.uuid4().hex}"

    def body(hear: Hear, tell: Tell) -> None:
        agent = Agent(job, hear())
        generation, port = hear().split()
        agent.exchange.open(int(generation), {0: Peer("sender", "127.0.0.1", int(port)), 1: agent.peer}, 1)
        tell(agent.exchange.port)
        agent.until(lambda: agent.exchange.replicas())
        tell(agent.exchange._store._files[0].fd)
        hear()

    children += [Child(body) for _ in range(ROUNDS)]
    sender, torn = Agent(job, "sender"), 0
    arena = sender.arena(0, SIZE + (2 << 20))
    try:
        for number, child in enumerate(children):
            child.tell(f"receiver-{number}")
            child.tell(f"{number} {sender.exchange.port}")
            peer = Peer(f"receiver-{number}", "127.0.0.1", int(child.hear()))
            sender.exchange.open(number, {0: sender.peer, 1: peer}, 0)
            arena.write(2 * number, payload_of(2 * number), chunk=CHUNK)
            sender.replicate(0, 2 * number, 1)
            torn += _receiver_dies(child, sender, arena, number)
    finally:
        sender.close()
    assert torn > ROUNDS // 2, f"only {torn} of {ROUNDS} were in mid-transfer"


def _receiver_dies(child: Child, sender: Agent, arena: Arena, number: int) -> bool:
    with Path(f"/proc/{child.pid}/fd/{child.hear()}").open("r+b") as held:
        file = SlotFile(held.fileno())
        try:
            step, block = 2 * number + 1, number * 5 % (SIZE // CHUNK - 2)
            arena.write(step, payload_of(step), chunk=CHUNK)
            sender.exchange.send(0, step, [1])
            expected = payload_of(step)[:64]
            start = PAGE + file.capacity + block * CHUNK
            until(lambda: expected in file.memory[start : start + 4096 + 64], LIMIT_S)
            child.kill()
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            steps = [slot.step for slot in file.slots()]
            for kept in steps:
                assert verified(file, kept).endswith(payload_of(kept))
            assert steps[0] == 2 * number
            return step not in steps
        finally:
            file.close()
