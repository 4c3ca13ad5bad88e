"""One generation at one rank: its keys, its ways to other ranks, what runs in it. Lives in the node's event loop.

States: open -> over, for good; what still runs then is cancelled, connections close, keys are gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning_gemini.peers import bruck, wire
from lightning_gemini.peers.keys import Keys
from lightning_gemini.peers.peer import Exchange, Peer

if TYPE_CHECKING:
    from lightning_gemini.peers.node import PeerNode


class Generation:
    """One generation at one rank: keys, connections, what runs in it."""

    def __init__(self, number: int, node: PeerNode) -> None:
        self.number = number
        self._node = node
        self.keys = Keys(node.rank, node.roster.size, self.ask)
        self.processes: dict[int, bytes] = {}
        """Rank -> the process that speaks for it."""
        self.tasks: set[asyncio.Task[Any]] = set()
        self._peers: dict[int, Peer] = {}

    async def ask(self, rank: int, message: wire.Question) -> Any:
        """Have `rank` answer a request."""
        if rank == self._node.rank:
            return await self.keys.serve(message, rank)
        return await self._peer(rank).call(message)

    def _peer(self, rank: int) -> Peer:
        if rank not in self._peers:
            self._peers[rank] = Peer(self._node, rank, self.number)
        return self._peers[rank]

    async def all_gather(self, name: str, rank: int, size: int, value: bytes, home: Callable[[int, str], int]) -> list[bytes]:
        """Bruck's all-gather among members that know their numbers; `home(member, box)` is the rank where a member's post is put."""
        blocks, exchange, rounds = [value], Exchange(), bruck.rounds(rank, size)
        for number, step in enumerate(rounds):  # connect to all at once: each loop then wakes up less often
            if (where := home(step.to, f"{name}#{number}>{step.to}")) != self._node.rank:
                self._peer(where).dial()
        for number, step in enumerate(rounds):
            self._post(home, step.to, f"{name}#{number}>{step.to}", blocks[: step.count], exchange)
            blocks += await exchange.wait(self._take(home, rank, f"{name}#{number}>{rank}"))
        return bruck.in_order(rank, blocks)

    def _post(self, home: Callable[[int, str], int], member: int, box: str, blocks: list[bytes], exchange: Exchange) -> None:
        where = home(member, box)
        if where == self._node.rank:
            self.keys.post(box, blocks)
        else:
            self._peer(where).post(wire.Post(box, blocks), exchange)

    def _take(self, home: Callable[[int, str], int], member: int, box: str) -> asyncio.Future[list[bytes]]:
        where = home(member, box)
        return self.keys.take(box) if where == self._node.rank else self._peer(where).call(wire.Take(box))

    def over(self) -> None:
        """End everything."""
        for task in self.tasks:
            task.cancel()
        for peer in self._peers.values():
            peer.close()
        self.keys.close()
