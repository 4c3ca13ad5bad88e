"""A connection that is refused: the reason is heard, also by a peer that finds it can no longer send."""

from __future__ import annotations

import asyncio
import socket

import pytest

from lightning_gemini.peers import wire
from lightning_gemini.peers.connection import Dialler
from lightning_gemini.peers.errors import RendezvousError, StaleGeneration
from tests.support.peers import Peers


class Asker:
    """Who dialled."""

    def __init__(self) -> None:
        self.error: asyncio.Future[RendezvousError] = asyncio.get_running_loop().create_future()

    def welcomed(self) -> None:
        raise AssertionError("nobody has said welcome")

    def answered(self, reply: wire.Reply) -> None:
        raise AssertionError("nothing was asked")

    def ended(self, error: RendezvousError) -> None:
        self.error.set_result(error)


def test_the_reason_of_a_refusal_is_heard_after_the_connection_has_closed() -> None:
    async def run() -> RendezvousError:
        ours, theirs = socket.socketpair()
        theirs.sendall(wire.frame(wire.encode(wire.Refusal("stale", "generation 0 is over, 7 has begun"))))
        theirs.close()
        asker = Asker()
        hello = wire.Hello(job="j", generation=0, rank=0, to=1, process=wire.nonce(), nonce=wire.nonce())
        Dialler(ours, b"", hello, asker)  # finds a broken pipe at its first word
        return await asyncio.wait_for(asker.error, 5)

    error = asyncio.run(run())
    assert isinstance(error, StaleGeneration) and "7 has begun" in str(error)


@pytest.mark.parametrize("attempt", range(10))
def test_a_peer_of_another_version_is_told(peers: Peers, monkeypatch: pytest.MonkeyPatch, attempt: int) -> None:
    nodes = peers.world(2, timeout_s=0.1)
    monkeypatch.setattr(wire, "VERSION", 2)  # what a Hello says was fixed when its class was made
    with pytest.raises(RendezvousError, match="version 2 of the protocol, not 1"):
        nodes[0].all_gather(0, "g", 0, 2, b"")
