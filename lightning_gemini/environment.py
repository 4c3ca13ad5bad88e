"""The cluster as Lightning sees it in a process that the agent started, and in the process the user started.

Seam: Lightning's `ClusterEnvironment`. A spare claims the last rank until it is given one, so that whatever asks before knows that it is
not rank 0. Addresses and ports are never used: there is no TCPStore.
"""

from __future__ import annotations

import os

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment


def in_agent() -> bool:
    """Whether this process was started by an agent."""
    return "LIGHTNING_GEMINI_CHANNEL" in os.environ


class GeminiEnvironment(ClusterEnvironment):
    """Ranks under their node's agent."""

    def __init__(self) -> None:
        super().__init__()
        self.rank: int | None = None
        self._world = int(os.environ.get("LIGHTNING_GEMINI_WORLD", "1"))
        self._per_node = int(os.environ.get("LIGHTNING_GEMINI_PER_NODE", self._world))
        if in_agent():
            rank = os.environ["LIGHTNING_GEMINI_RANK"]
            self.rank = int(rank) if rank else None

    @property
    def creates_processes_externally(self) -> bool:
        """The agent creates them."""
        return True

    @property
    def main_address(self) -> str:
        """Not used."""
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        """Not used."""
        return 0

    @staticmethod
    def detect() -> bool:
        """Whether an agent started this process."""
        return in_agent()

    def world_size(self) -> int:
        """Ranks of the job."""
        return self._world

    def set_world_size(self, size: int) -> None:
        """Lightning derives it from `devices`; the agent's word counts."""
        if not in_agent():
            self._world = size

    def global_rank(self) -> int:
        """This process's rank."""
        if self.rank is not None:
            return self.rank
        return self._world - 1 if in_agent() else 0

    def set_global_rank(self, rank: int) -> None:
        """The agent's word counts."""

    def local_rank(self) -> int:
        """Rank within the node."""
        return self.global_rank() % self._per_node

    def node_rank(self) -> int:
        """Index of the node."""
        return self.global_rank() // self._per_node
