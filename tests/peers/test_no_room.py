"""A rank without a free descriptor does not spin, and goes on when there is room again."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import time

from lightning_gemini.peers.node import PeerNode
from lightning_gemini.peers.roster import Roster
from tests.support.forked import Ranks, Tell
from tests.support.peers import assert_works, new_job

LOOK_S = 0.5


def test_a_connection_that_cannot_be_taken_waits() -> None:
    roster = Roster.on_one_node(new_job(), 2)

    def body(rank: int, tell: Tell) -> None:  # both ranks in a process of its own, whose limit is lowered
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        nodes = [PeerNode(roster, number, timeout_s=20) for number in range(2)]
        caller = socket.socket(socket.AF_UNIX)
        hoard = []
        with contextlib.suppress(OSError):
            while True:
                hoard.append(os.open("/dev/null", os.O_RDONLY))
        caller.connect("\0" + roster.addresses[0][0].host)
        before, deadline = time.process_time(), time.monotonic() + LOOK_S
        while time.monotonic() < deadline:
            time.sleep(0.01)
        used = time.process_time() - before
        for descriptor in hoard:
            os.close(descriptor)
        assert_works(nodes)
        for node in nodes:
            node.close()
        tell("calm" if used < LOOK_S / 2 else f"{used:.2f} s of CPU in {LOOK_S} s")

    ranks = Ranks(body, 1)
    try:
        assert ranks.hear(0) == "calm"
    finally:
        ranks.end()
