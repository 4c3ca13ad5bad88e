"""How a node becomes part of a job: as its only node, or through etcd (`agent.joining`)."""

from __future__ import annotations

import os
import selectors
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_gemini.agent.decision import decide
from lightning_gemini.membership.local import LocalMembership
from lightning_gemini.membership.records import Generation, NodeInfo

if TYPE_CHECKING:
    from lightning_gemini.agent.node import Node


@dataclass(frozen=True, slots=True)
class Job:
    """What a node knows of its job."""

    name: str
    """Names the job in event files and handshakes."""
    node: str
    """Name of this incarnation of the node."""
    token: str = ""
    """Secret that its ranks and agents prove themselves with."""
    log_name: str = "agent"
    """Of the agent's event file."""

    def index_in(self, generation: Generation) -> int | None:
        """This node's place in a roster."""
        return generation.roster.index(self.node) if self.node in generation.roster else None


Join = Callable[["Node", selectors.BaseSelector], Job]
"""Gives the coordinator its membership, and the other nodes if there are any."""


def alone(node: Node, selector: selectors.BaseSelector) -> Job:
    """This node is the whole job."""
    name = f"{os.getpid()}-{time.time_ns()}"
    membership = LocalMembership(decide, node)
    node.coordinator.membership = membership
    membership.join(NodeInfo(node=name, host="127.0.0.1", port=0, ranks_per_node=node.ranks_per_node))
    return Job(name, name)
