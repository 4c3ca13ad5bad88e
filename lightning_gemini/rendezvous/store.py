"""A `torch.distributed.Store` without a server: its keys live in the ranks themselves.

Seam: everything stock torch does with a store. Gloo publishes one key for each member of a group and reads all of them: that becomes one
all-gather in log2 N rounds. Any other key has an owner among the ranks, found by hashing (`peers.keys`). What has no meaning
without a central table (`num_keys`, `list_keys`, the queues) raises `NotImplementedError` and says what to use.

Every key is bound to a generation: when that is over, all operations raise `StaleGeneration`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

from torch.distributed import DistStoreError, Store  # type: ignore[attr-defined]

from lightning_gemini.peers import wire
from lightning_gemini.peers.node import PeerNode

_OF_A_GROUP = re.compile(r"(.*//\w+//\d+/)(\d+)")
"""How gloo names the key of a member: `<group>//<device>//<number>/<group rank>`."""
T = TypeVar("T")


class PeerStore(Store):
    """Keys of one generation under one prefix. `members` are the global ranks of the group it serves, where they are known."""

    def __init__(self, node: PeerNode, *, generation: int | None = None, prefix: str = "", members: Sequence[int] | None = None) -> None:
        super().__init__()
        os.environ.setdefault("GLOO_ENABLE_STORE_V2_API", "1")  # gloo then reads the keys of a group in one call
        self._node, self._members = node, members
        self._generation = node.generation if generation is None else generation
        self._prefix = f"{self._generation}/{prefix}"
        self.set_timeout(timedelta(seconds=node.timeout_s))  # kept by the base class: a PrefixStore around this one changes it there
        self._held: dict[str, tuple[int, bytes]] = {}
        """Prefix of a group -> our member's number and value, until the group is exchanged."""
        self._gathered: dict[str, bytes] = {}
        node.keep(self._generation, self)

    def _ask(self, message: wire.Get | wire.Check | wire.Change, timeout: timedelta | None = None) -> Any:
        limit = timeout or self.timeout
        try:
            return self._node.call(self._generation, message, limit.total_seconds())
        except TimeoutError:
            name = message.key.removeprefix(self._prefix)
            raise DistStoreError(f"waited {limit.total_seconds():g} s for key {name!r} in rank {self._node.rank}") from None

    # ---- one key

    def set(self, key: str, value: str | bytes) -> None:
        """Publish a key."""
        data = value.encode() if isinstance(value, str) else bytes(value)
        if match := _OF_A_GROUP.fullmatch(key):
            self._held[match[1]] = (int(match[2]), data)
        else:
            self._ask(wire.Put(self._prefix + key, data))

    def get(self, key: str) -> bytes:
        """Wait for a key and return it. Raises `DistStoreError` after the store's timeout."""
        return self._get(key, None)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait for keys."""
        for key in keys:
            self._get(key, timeout)

    def _get(self, key: str, timeout: timedelta | None) -> bytes:
        if key in self._gathered:
            return self._gathered[key]
        self._publish(key)
        value: bytes = self._ask(wire.Get(self._prefix + key), timeout)[1]
        return value

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there; does not wait."""
        for key in keys:
            self._publish(key)
        return all(key in self._gathered or self._ask(wire.Check(self._prefix + key)) for key in keys)

    def _publish(self, key: str) -> None:
        """Someone reads a group's keys one by one (a gloo that cannot do better): then ours must be found too."""
        match = _OF_A_GROUP.fullmatch(key)
        if match and match[1] in self._held:
            number, value = self._held.pop(match[1])
            self._ask(wire.Put(f"{self._prefix}{match[1]}{number}", value))

    def add(self, key: str, amount: int) -> int:
        """Add to a counter and return the sum."""
        total: int = self._ask(wire.Add(self._prefix + key, amount))
        return total

    def append(self, key: str, value: str | bytes) -> None:
        """Append to a value."""
        self._ask(wire.Append(self._prefix + key, value.encode() if isinstance(value, str) else bytes(value)))

    def compare_set(self, key: str, expected_value: str, desired_value: str) -> bytes:
        """Set `key` if it has the expected value, or if it has none and "" is expected; returns what it then has."""
        value: bytes = self._ask(wire.CompareSet(self._prefix + key, expected_value.encode(), desired_value.encode()))
        return value

    def delete_key(self, key: str) -> bool:
        """Remove a key; whether it was there."""
        there: bool = self._ask(wire.Delete(self._prefix + key))
        return there

    # ---- many keys

    def has_extended_api(self) -> bool:
        """`append`, `multi_get` and `multi_set` are offered."""
        return True

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Wait for keys and return them; the keys of all members of a group are exchanged among the members."""
        match = _OF_A_GROUP.fullmatch(keys[0]) if keys else None
        if match and match[1] in self._held and keys == [f"{match[1]}{number}" for number in range(len(keys))]:
            return self._exchange(match[1], keys)
        return [self.get(key) for key in keys]

    def _exchange(self, group: str, keys: list[str]) -> list[bytes]:
        number, value = self._held.pop(group)
        try:
            values = self._node.all_gather(
                self._generation, self._prefix + group, number, len(keys), value, self._members, self.timeout.total_seconds()
            )
        except TimeoutError:
            raise DistStoreError(
                f"rank {self._node.rank} waited {self.timeout.total_seconds():g} s for the {len(keys)} members of group {group!r}"
            ) from None
        self._gathered.update(zip(keys, values, strict=True))
        return values

    def multi_set(self, keys: list[str], values: list[str | bytes]) -> None:
        """Publish keys."""
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    # ---- about the store

    @property
    def timeout(self) -> timedelta:
        """Limit of an operation that has none of its own; `set_timeout`, of this store or of one around it, changes it."""
        limit: timedelta = super().timeout  # type: ignore[misc]
        return limit

    def clone(self) -> PeerStore:
        """Another handle; it shares the connections, which may be used from any thread."""
        other = PeerStore(self._node, generation=self._generation, members=self._members)
        other._prefix = self._prefix
        other.set_timeout(self.timeout)
        return other

    def num_keys(self) -> int:
        """Not offered."""
        return self._refuse("num_keys", "no rank knows all keys; count with store.add")

    def list_keys(self) -> list[str]:
        """Not offered."""
        return self._refuse("list_keys", "no rank knows all keys; keep their names under one key with store.append")

    def queue_push(self, key: str, value: str | bytes) -> None:
        """Not offered."""
        self._refuse("queue_push", "use store.append, or torch.distributed.send")

    def queue_pop(self, key: str, block: bool = True) -> bytes:
        """Not offered."""
        return self._refuse("queue_pop", "use store.get, or torch.distributed.recv")

    def queue_len(self, key: str) -> int:
        """Not offered."""
        return self._refuse("queue_len", "use store.add to count")

    def _refuse(self, name: str, remedy: str) -> NoReturn:
        raise NotImplementedError(f"store.{name} needs a central server, which a peer-to-peer store does not have: {remedy}")
