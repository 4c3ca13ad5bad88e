"""A process under the agent's care, as the agent sees it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from lightning_gemini.agent.channel import Channel
from lightning_gemini.agent.messages import Message, Stopped, encode
from lightning_gemini.agent.spawn import Child


@dataclass(slots=True, eq=False)
class Member:
    """States: starting -> in_fit -> left -> (ended). A spare has no rank and `waiting` tells that it is warm."""

    child: Child
    channel: Channel
    rank: int | None
    started_ns: int
    in_fit: bool = False
    left: bool = False
    waiting: bool = False
    begun: bool = False
    """It has asked where to begin: a later `fit` of the same process is another training."""
    fresh: bool = False
    """It was given its rank in the present generation: it has nothing to stop."""
    stopped: Stopped | None = None
    ended: bool = False

    @property
    def name(self) -> str:
        """For log lines."""
        return "spare" if self.rank is None else f"rank {self.rank}"

    def send(self, message: Message) -> None:
        """Send, or leave it: a dead peer is noticed through its pidfd."""
        with contextlib.suppress(OSError):
            self.channel.send(encode(message))
