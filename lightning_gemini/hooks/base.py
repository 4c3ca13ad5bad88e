"""What the hooks share: the options, the link to the agent, the engine.

Seam: `GeminiBase` holds state and no behaviour of Lightning; `Joining` and `Stepping` add that, and the Strategies put them before
Lightning's own class.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_gemini import checks
from lightning_gemini.agent.messages import Recovered
from lightning_gemini.compat import lightning as compat
from lightning_gemini.compat import nemo
from lightning_gemini.config import GeminiConfig, parse
from lightning_gemini.environment import GeminiEnvironment, in_agent
from lightning_gemini.hooks.inputs import Inputs
from lightning_gemini.recovery.engine import Engine
from lightning_gemini.recovery.landing import Landing
from lightning_gemini.rendezvous.link import Link
from lightning_gemini.rendezvous.world import Mode, World
from lightning_gemini.state.catalogue import Entry, catalogue
from lightning_gemini.state.ownership import Layout
from lightning_gemini.telemetry.events import EventLog

_process: dict[str, Any] = {}
"""The link and world of this process: they outlive a strategy, because a script may call `fit` more than once."""


class GeminiBase:
    """Recovery for a Lightning strategy whose ranks are processes of one node."""

    replicated = True
    """Whether all ranks hold the same parameters and optimizer state."""

    config: GeminiConfig
    loader_positions: list[dict[str, Any]]
    cluster_environment: Any
    _launcher: Any
    _trainer: pl.Trainer

    def _init_gemini(self, **groups: Any) -> None:
        """`groups` of options, by the names of GeminiConfig; None for the defaults."""
        self.config = parse(GeminiConfig, {key: value for key, value in groups.items() if value is not None})
        self.cluster_environment = GeminiEnvironment()
        self.loader_positions = []
        self.inputs = Inputs()
        nemo.settle(started_by_agent=in_agent(), spare=in_agent() and self.cluster_environment.rank is None)
        self.load_from = ""
        """The checkpoint of a job of another size that this one goes on from."""
        self._persisted = -1
        self.engine: Engine | None = None
        self.landing: Landing | None = None
        self.events: EventLog | None = None
        self.recoveries: list[Recovered] = []
        """Recoveries of this job that this rank has been told of, oldest first."""
        self._on_sigterm: list[Callable[[int, Any], Any]] = []
        """Handlers of the script and its callbacks; they are called after the step that the agent names."""
        self._accumulating = False
        """Automatic optimization: gradients hold something that the optimizer has not used yet."""
        self._used: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        """Manual optimization: the gradients (by id of their parameter), with version, that an optimizer has used."""

    @property
    def link(self) -> Link:
        """The connection to the agent."""
        return _process["link"]  # type: ignore[no-any-return]

    @property
    def world(self) -> World:
        """What this process's groups share."""
        return _process["world"]  # type: ignore[no-any-return]

    def entries(self) -> list[Entry]:
        """The live tensors of the state."""
        return self.catalogue(compat.unwrap_optimizers(self._trainer))

    def catalogue(self, optimizers: list[torch.optim.Optimizer]) -> list[Entry]:
        """The live tensors of the model and these optimizers."""
        module, world = self.lightning_module, self.world  # type: ignore[attr-defined]
        return catalogue(module, optimizers, replicated=self.replicated, rank=world.rank, world=world.size, own=self.unsynchronized())

    def check_layout(self) -> None:
        """All ranks have built the same model."""
        checks.same_layout(self.catalogue([]), self.replicated)

    def rank_state(self) -> dict[str, Any]:
        """What the strategy itself keeps for this rank between steps; part of the rank-local state."""
        return {}

    def restore_rank_state(self, state: dict[str, Any]) -> None:
        """Inverse of `rank_state`."""

    def unsynchronized(self) -> set[int]:
        """Ids of parameters that train, but each rank for itself, although all others are replicated; only DDP has some."""
        return set()

    def has_donors(self) -> bool:
        """Whether each rank's whole state is live in another rank of its node too, once the optimizers have made theirs: where a node has
        another one."""
        return self.replicated

    def layout(self) -> Layout:
        """Where this rank is among nodes and ranks."""
        nodes = self.link.world // self.link.per_node
        return Layout(self.world.rank, self.link.world, self.link.per_node, min(self.config.replication.copies, nodes))

    def emit(self, event: str, **fields: Any) -> None:
        """Telemetry."""
        if self.events is not None:
            self.events.emit(event, rank=self.link.rank, **fields)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Collectives answer alone."""
        mode, self.world.mode = self.world.mode, Mode.STAND_IN
        try:
            yield
        finally:
            self.world.mode = mode

    def asked_to_end(self) -> bool:
        """Whether the agent wants the job to end after this step."""
        return self.engine is not None and 0 < self.link.end_at <= self.engine.step
