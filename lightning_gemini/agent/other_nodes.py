"""The seam between a node's coordinator and what it has of other nodes; `agent.others` is behind it. A single node has nobody there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from lightning_gemini.recovery.plan import RecoveryPlan

if TYPE_CHECKING:
    from lightning_gemini.agent.coordinator import Coordinator


class OtherNodes(Protocol):
    """What a node has of others, and gets from them; see `agent.others`. Nobody on a single node."""

    def open(self, coordinator: Coordinator) -> None:
        """A generation has begun, or this node's memory is new."""

    def place(self) -> None:
        """Choose the placement group anew: the options are known, or the nodes are others."""

    def describe(self) -> list[str]:
        """Lines for the start: what the placement survives."""

    def voted(self) -> None:
        """Words of this node's ranks, or of its storage, have changed."""

    def completed(self, word: int) -> None:
        """A checkpoint is complete: all nodes shall know."""

    def ask_to_end(self) -> None:
        """All ranks of all nodes shall end after the same step."""

    def close(self) -> None:
        """Close connections, join threads."""

    def replicas(self) -> dict[int, dict[int, str]]:
        """See `NodeReport`."""

    def fetch(self, plan: RecoveryPlan, done: Callable[[BaseException | None], None]) -> None:
        """Get what this node lacks for the plan, then call `done`, in the agent's thread, with what went wrong."""
