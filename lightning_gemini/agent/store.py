"""The rendezvous keys of a generation, kept by the agent.

Seam: `set` and `get` by messages; `get` is answered when all keys are there. Opening a new generation drops the keys of the old one and
answers its waiting requests with None, so that a rank that was forming a group of the old generation learns of it at once. A message
of an older generation is answered the same way and never stored: a process that wakes late can harm nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lightning_gemini.agent.messages import StoreGet, StoreSet, StoreValues

Reply = Callable[[StoreValues], None]


@dataclass(slots=True)
class KeyStore:
    """Keys of the current generation and the requests that wait for some."""

    generation: int = 0
    _values: dict[str, bytes] = field(default_factory=dict)
    _waiting: list[tuple[StoreGet, Reply]] = field(default_factory=list)

    def open(self, generation: int) -> None:
        """Begin a generation."""
        stale, self._waiting = self._waiting, []
        self.generation = generation
        self._values.clear()
        for request, reply in stale:
            reply(StoreValues(request=request.request, values=None))

    def set(self, message: StoreSet) -> None:
        """Publish a key, and answer whoever waited for it."""
        if message.generation != self.generation:
            return
        self._values[message.key] = message.value
        waiting, self._waiting = self._waiting, []
        for request, reply in waiting:
            self.get(request, reply)

    def get(self, message: StoreGet, reply: Reply) -> None:
        """Answer now if all keys are there, else later."""
        if message.generation != self.generation:
            reply(StoreValues(request=message.request, values=None))
        elif all(key in self._values for key in message.keys):
            reply(StoreValues(request=message.request, values=[self._values[key] for key in message.keys]))
        else:
            self._waiting.append((message, reply))
