"""The processes of a node: its ranks and spares, and the loader processes that ranks have forked.

Seam: `start` starts one, `ranks` are those that live, `end_all` leaves none behind. What a message or an exit means is for the
supervisor. A process that cannot be started raises `OSError`, which ends the job.
"""

from __future__ import annotations

import contextlib
import selectors
import time
from collections.abc import Callable

from lightning_gemini.agent.channel import Channel
from lightning_gemini.agent.loaders import Loaders
from lightning_gemini.agent.member import Member
from lightning_gemini.agent.memory import NodeFiles
from lightning_gemini.agent.messages import Stop
from lightning_gemini.agent.spawn import Spawner

MAX_SPARE_FAILURES = 3


class Crew:
    """See the module's docstring. `on_message` and `on_exit` are called from the selector's loop."""

    def __init__(self, spawner: Spawner, selector: selectors.BaseSelector) -> None:
        self.spawner, self.selector = spawner, selector
        self.on_message: Callable[[Member], object] = lambda _: None
        self.on_exit: Callable[[Member], object] = lambda _: None
        self.members: list[Member] = []
        self.loaders = Loaders()
        self.private: list[int] = []
        """More descriptors of the agent that no child may keep."""
        self.spare_failures = 0
        """Spares in a row that ended before they were ready."""

    def ranks(self) -> dict[int, Member]:
        """The living ranks of this node."""
        return {member.rank: member for member in self.members if member.rank is not None and not member.ended}

    def living(self) -> list[Member]:
        """Ranks and spares."""
        return [member for member in self.members if not member.ended]

    def idle(self) -> list[Member]:
        """Living spares, warm or not."""
        return [member for member in self.members if member.rank is None and not member.ended]

    def warm(self) -> Member | None:
        """A spare that waits for a rank."""
        return next((member for member in self.idle() if member.waiting), None)

    def done(self) -> list[Member]:
        """Ranks that have ended well."""
        return [member for member in self.members if member.rank is not None and member.ended and member.left]

    def start(self, rank: int | None, environment: dict[str, str], files: NodeFiles) -> None:
        """Start a rank, or (None) a spare, which inherits the node's memory."""
        channel, theirs = Channel.pair()
        own = {
            "LIGHTNING_GEMINI_CHANNEL": str(theirs.fileno()),
            "LIGHTNING_GEMINI_FILES": files.to_text(),
            "LIGHTNING_GEMINI_RANK": "" if rank is None else str(rank),
        }
        try:
            child = self.spawner.spawn(environment | own, [theirs.fileno(), *files.all()], [channel.fileno(), *self.own_descriptors()])
        finally:
            theirs.close()
        member = Member(child, channel, rank, time.monotonic_ns())
        self.members.append(member)
        self.selector.register(channel, selectors.EVENT_READ, lambda: self.on_message(member))
        self.selector.register(child.pidfd, selectors.EVENT_READ, lambda: self.on_exit(member))

    def own_descriptors(self) -> list[int]:
        """The agent's ends, which no child may keep: it would hide the agent's death, or a peer's."""
        alive = self.living()
        return [*self.private, *self.loaders.descriptors(), *(m.channel.fileno() for m in alive), *(m.child.pidfd for m in alive)]

    def forget(self, member: Member) -> None:
        """Before the descriptors are closed: epoll keeps an entry whose file a forked child still holds, and would report it under the
        number's next owner."""
        member.ended = True
        for file in (member.channel, member.child.pidfd):
            with contextlib.suppress(KeyError, ValueError):
                self.selector.unregister(file)
        member.channel.close()

    def end_all(self) -> None:
        """Kill and reap everybody."""
        for member in self.living():
            member.send(Stop(reason="the job has ended"))
            member.child.kill()
        for member in self.living():
            self.forget(member)
            member.child.reap()
        self.loaders.end()
