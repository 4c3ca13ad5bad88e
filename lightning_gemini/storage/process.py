"""The agent's end of the storage process.

Seam: `StorageProcess.start(spawner, arenas, description)`, then `send(request)`, and `receive()` when `channel` is readable;
`child.pidfd` is readable when it has ended. `close` ends it. No torch here, and no file system: one that hangs hangs the storage
process, and the agent gives up its request by a deadline of its own (`close`, then `start` another).

Failure: `send` to a process that has gone raises `BrokenPipeError`, `receive` returns None.
"""

from __future__ import annotations

import select
import sys
from collections.abc import Sequence
from typing import NamedTuple

from lightning_gemini.agent.channel import Channel
from lightning_gemini.agent.spawn import Child, ExecSpawner, Spawner
from lightning_gemini.storage import messages
from lightning_gemini.storage.messages import Answer, Message

ENVIRONMENT = "LIGHTNING_GEMINI_STORAGE"


def spawner() -> Spawner:
    """What users get: a fresh interpreter."""
    return ExecSpawner([sys.executable, "-m", "lightning_gemini.storage.writer"])


class Descriptors(NamedTuple):
    """What the process inherits: numbers of descriptors."""

    channel: int
    description: int
    """Slots where the node's rank 0 publishes what it says of a step."""
    arenas: list[int]

    def all(self) -> list[int]:
        """Every descriptor, for inheritance."""
        return [self.channel, self.description, *self.arenas]

    def to_text(self) -> str:
        """For an environment variable."""
        return ",".join(map(str, self.all()))

    @classmethod
    def from_text(cls, text: str) -> Descriptors:
        """Inverse of `to_text`."""
        channel, description, *arenas = map(int, text.split(","))
        return cls(channel, description, arenas)


class StorageProcess:
    """A running storage process."""

    def __init__(self, channel: Channel, child: Child) -> None:
        self.channel, self.child = channel, child

    @classmethod
    def start(cls, spawner: Spawner, *, arenas: Sequence[int], description: int, drop: Sequence[int] = ()) -> StorageProcess:
        """Start one that holds `arenas` and `description` (a memfd for `storage.description`), and none of `drop`. Raises `OSError`."""
        channel, theirs = Channel.pair()
        descriptors = Descriptors(theirs.fileno(), description, list(arenas))
        try:
            child = spawner.spawn({ENVIRONMENT: descriptors.to_text()}, descriptors.all(), (channel.fileno(), *drop))
        except BaseException:
            channel.close()
            raise
        finally:
            theirs.close()
        return cls(channel, child)

    def send(self, request: Message) -> None:
        """Make a request; they are carried out in order. Raises `BrokenPipeError`, and `BlockingIOError` after the channel's deadline."""
        self.channel.send(messages.encode(request))

    def receive(self, *, wait: bool = False) -> Answer | None:
        """The next answer, or None when the process has gone. Without `wait`, raises `BlockingIOError` when there is none."""
        data = self.channel.receive(wait=wait)
        return None if data is None else messages.decode_answer(data)

    def close(self, limit_s: float = 5.0) -> int:
        """End it: it may finish what it does within the limit, then it is killed. Returns its exit status."""
        self.channel.close()
        poll = select.poll()
        poll.register(self.child.pidfd, select.POLLIN)
        if self.child.exit_code is None and not poll.poll(limit_s * 1000):
            self.child.kill()
        return self.child.reap()

    def kill(self) -> int:
        """End it at once, where what it does is in vain."""
        self.child.kill()
        return self.close()
