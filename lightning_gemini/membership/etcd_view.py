"""What an agent knows of its job's keys in etcd. Pure: answers and events go in.

Seam: `reset` takes all keys, read at once; `apply` the changes since. A record that cannot be read is as good as absent: whoever wrote it
runs another version.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

from lightning_gemini.membership.etcd_keys import Formed, coded, number_key, past, revision_of
from lightning_gemini.membership.records import Completed, Ending, NodeInfo, NodeReport, Outcome
from lightning_gemini.recovery.plan import RecoveryPlan


class Held(NamedTuple):
    """A key of etcd, decoded."""

    value: Any
    modified: int
    """Revision of its last change."""
    lease: int


_DECODERS: dict[str, msgspec.msgpack.Decoder[Any]] = {
    "nodes": msgspec.msgpack.Decoder(NodeInfo),
    "leader": msgspec.msgpack.Decoder(str),
    "generation": msgspec.msgpack.Decoder(Formed),
    "reports": msgspec.msgpack.Decoder(NodeReport),
    "plans": msgspec.msgpack.Decoder(RecoveryPlan),
    "completed": msgspec.msgpack.Decoder(Completed),
    "recovered": msgspec.msgpack.Decoder(Outcome),
    "finished": msgspec.msgpack.Decoder(int),
    "ending": msgspec.msgpack.Decoder(Ending),
}  # fmt: skip


class View:
    """All keys of a job, as of `revision`."""

    def __init__(self, prefix: str) -> None:
        self.prefix, self.revision = prefix, 0
        self.cluster = ""
        self.lost = False
        """etcd has forgotten what it knew before."""
        self._held: dict[str, Held] = {}

    def reset(self, answer: dict[str, Any]) -> None:
        """Begin anew with all keys, read at once."""
        header = answer["header"]
        self.lost |= revision_of(answer) < self.revision or self.cluster not in ("", header["cluster_id"])
        self.revision, self.cluster = revision_of(answer), header["cluster_id"]
        self._held.clear()
        for pair in answer.get("kvs", []):
            self._hold(pair)

    def apply(self, events: Iterable[dict[str, Any]]) -> None:
        """Follow changes; those that are in the view already are skipped."""
        for event in events:
            pair = event["kv"]
            if int(pair["mod_revision"]) < self.revision:
                continue
            self.revision = int(pair["mod_revision"])
            if event.get("type") == "DELETE":
                self._held.pop(self._name(pair), None)
            else:
                self._hold(pair)

    def _name(self, pair: dict[str, Any]) -> str:
        return b64decode(pair["key"]).decode().removeprefix(self.prefix)

    def _hold(self, pair: dict[str, Any]) -> None:
        name = self._name(pair)
        try:
            value = _DECODERS[name.partition("/")[0]].decode(b64decode(pair.get("value", "")))
        except (KeyError, msgspec.MsgspecError):
            self._held.pop(name, None)
        else:
            self._held[name] = Held(value, int(pair["mod_revision"]), int(pair.get("lease", 0)))

    def keys(self) -> dict[str, str]:
        """The range that holds them, for a request."""
        return {"key": coded(self.prefix), "range_end": coded(past(self.prefix))}

    def held(self, name: str) -> Held | None:
        """One key, or None."""
        return self._held.get(name)

    def at(self, *names: str) -> dict[str, int]:
        """Revisions of keys, for `Change.unchanged`."""
        return {name: held.modified if (held := self._held.get(name)) else 0 for name in names}

    def value(self, name: str) -> Any:
        """Of one key, or None."""
        held = self._held.get(name)
        return None if held is None else held.value

    def _below(self, prefix: str) -> dict[str, Any]:
        return {name.removeprefix(prefix): held.value for name, held in self._held.items() if name.startswith(prefix)}

    @property
    def nodes(self) -> dict[str, NodeInfo]:
        """Everybody who is registered, in the order of registration."""
        order = sorted((held for name, held in self._held.items() if name.startswith("nodes/")), key=lambda held: held.modified)
        return {held.value.node: held.value for held in order}

    @property
    def formed(self) -> Formed | None:
        """The newest generation, or None before the first."""
        found: Formed | None = self.value("generation")
        return found

    @property
    def ending(self) -> Ending | None:
        """How the job ended."""
        found: Ending | None = self.value("ending")
        return found

    def plan(self, number: int) -> RecoveryPlan | None:
        """Of a generation."""
        found: RecoveryPlan | None = self.value(number_key("plans", number))
        return found

    def reports(self, number: int) -> dict[int, NodeReport]:
        """By index."""
        return {int(index): report for index, report in self._below(number_key("reports", number) + "/").items()}

    def completed(self, number: int) -> dict[int, Completed]:
        """By index."""
        return {int(index): completed for index, completed in self._below(number_key("completed", number) + "/").items()}

    def outcomes(self) -> list[Outcome]:
        """Of the newest recoveries, in order."""
        return sorted(self._below("recovered/").values(), key=lambda outcome: outcome.number)

    def finished(self) -> set[int]:
        """Indices whose ranks have ended well."""
        return {int(index) for index in self._below("finished/")}
