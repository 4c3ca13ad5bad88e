"""What a job keeps in etcd: names of keys, and changes that are made all at once or not at all. Pure.

All below `/lightning_gemini/<job>/`; records are MessagePack.

    nodes/<node>               NodeInfo      with the lease of the node: gone when it is
    leader                     node          with the same lease; created once, by whoever comes first
    generation                 Formed        changed only by who knows the newest
    reports/<number>/<index>   NodeReport
    plans/<number>             RecoveryPlan  created once
    completed/<number>/<index> Completed
    recovered/<number>         Outcome       created once
    finished/<index>           number
    ending                     Ending        created once

All but the first two have the lease of the job, which the leader renews: a job whose agents are all killed leaves nothing behind either.
"""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import msgspec

from lightning_gemini.membership.records import Generation, NodeInfo

_ENCODE = msgspec.msgpack.Encoder().encode
_OF_A_GENERATION = ("reports", "plans", "completed", "recovered")


class Formed(msgspec.Struct):
    """A generation with all that is known of its nodes, those included that have died since."""

    generation: Generation
    nodes: dict[str, NodeInfo]


def node_key(node: str) -> str:
    """Of a node's registration."""
    return f"nodes/{quote(node, safe='')}"


def number_key(kind: str, number: int, index: int | None = None) -> str:
    """Of something that belongs to a generation. Numbers have eight digits, so that etcd sorts them."""
    return f"{kind}/{number:08d}" if index is None else f"{kind}/{number:08d}/{index}"


def coded(text: str | bytes) -> str:
    """As the gateway wants keys and values."""
    return b64encode(text.encode() if isinstance(text, str) else text).decode()


def past(prefix: str) -> str:
    """The first key after all those with `prefix`."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


def revision_of(answer: dict[str, Any]) -> int:
    """etcd's own count of changes, when it answered."""
    return int(answer["header"].get("revision", 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Records to write, made only if some keys are as they were."""

    puts: dict[str, Any]
    unchanged: dict[str, int] = field(default_factory=dict)
    """Key -> revision of its last change; 0: it is not there."""
    deletes: tuple[str, ...] = ()
    forget_before: int = 0
    """Also delete what belongs to generations below this one."""

    def request(self, prefix: str, lease: int) -> dict[str, Any]:
        """The transaction of etcd."""
        compare = [_is_at(prefix + key, revision) for key, revision in self.unchanged.items()]
        then = [put(prefix + key, value, lease) for key, value in self.puts.items()]
        then += [_delete(prefix + key) for key in self.deletes]
        if self.forget_before > 0:
            then += [_delete(f"{prefix}{kind}/", f"{prefix}{number_key(kind, self.forget_before)}") for kind in _OF_A_GENERATION]
        return {"compare": compare, "success": then}


def put(key: str, value: Any, lease: int) -> dict[str, Any]:
    """One operation of a transaction."""
    return {"request_put": {"key": coded(key), "value": coded(_ENCODE(value)), "lease": lease}}


def create(key: str, value: Any, lease: int) -> dict[str, Any]:
    """A transaction that writes a key if it is not there."""
    return {"compare": [_is_at(key, 0)], "success": [put(key, value, lease)]}


def clear_if_left(prefix: str) -> dict[str, Any]:
    """A transaction that deletes everything of a job if no node is registered any more."""
    nodes = f"{prefix}nodes/"
    nobody = {"key": coded(nodes), "range_end": coded(past(nodes)), "target": "VERSION", "result": "EQUAL", "version": 0}
    return {"compare": [nobody], "success": [_delete(prefix, past(prefix))]}


def _is_at(key: str, revision: int) -> dict[str, Any]:
    return {"key": coded(key), "target": "MOD", "result": "EQUAL", "mod_revision": revision}


def _delete(key: str, end: str = "") -> dict[str, Any]:
    return {"request_delete_range": {"key": coded(key), **({"range_end": coded(end)} if end else {})}}
