"""A `torch.distributed.Store` whose keys live in the node's agent: no TCPStore, no port, no rank that serves the others.

Seam: what torch's backends use to form one group (set, get, wait); PrefixStore works on top. Every key belongs to a generation: a wait
that is overtaken by a newer one raises `StaleGeneration` at once. Operations that would need a shared counter are not needed by the
backends and raise `NotImplementedError` with a remedy.
"""

from __future__ import annotations

from datetime import timedelta

from torch.distributed import Store  # type: ignore[attr-defined]

from lightning_gemini.rendezvous.link import Link


class AgentStore(Store):
    """Keys of one generation under one prefix."""

    def __init__(self, link: Link, generation: int, prefix: str, timeout_s: float) -> None:
        super().__init__()
        self._link, self._generation, self._prefix, self._timeout_s = link, generation, prefix, timeout_s

    def set(self, key: str, value: str | bytes) -> None:
        """Publish a key."""
        self._link.set(self._generation, self._prefix + key, value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        """Wait for a key and return it."""
        return self._link.get(self._generation, [self._prefix + key], self._timeout_s)[0]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait for keys."""
        self._link.get(self._generation, [self._prefix + key for key in keys], timeout.total_seconds() if timeout else self._timeout_s)

    def add(self, key: str, amount: int) -> int:
        """Not offered."""
        raise NotImplementedError(f"store.add({key!r}): the agent's store forms process groups only; use an all_reduce to count")
