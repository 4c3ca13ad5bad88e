"""The Strategies: Lightning's own DDP and FSDP2 with recovery.

`hooks` holds what both do; here is what differs: which tensors all ranks share, and how the model's wrapper is brought back to its
state between steps after an attempt that did not finish.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.nn.parallel import DistributedDataParallel

from lightning_gemini import checks
from lightning_gemini.compat import lightning as compat
from lightning_gemini.compat.torch import ReadyOrder, impose_layout, reset_fsdp, reshard_fsdp
from lightning_gemini.config import (
    FaultConfig,
    MembershipConfig,
    PersistentConfig,
    RecoveryConfig,
    ReplicationConfig,
    SnapshotConfig,
    TelemetryConfig,
)
from lightning_gemini.hooks.joining import Joining
from lightning_gemini.hooks.stepping import set_trainable

_DDP_FLAGS = ("require_forward_param_sync", "require_backward_grad_sync")


class GeminiStrategy(Joining, DDPStrategy):
    """Lightning's DDP with recovery. Keyword arguments other than ours are DDPStrategy's and DistributedDataParallel's.

    Args:
        snapshot, recovery, telemetry, replication, membership, persistent, faults: see `lightning_gemini.config`; a dataclass or a mapping
        each.
    """

    strategy_name = "gemini"

    def __init__(
        self,
        *,
        snapshot: SnapshotConfig | Mapping[str, Any] | None = None,
        recovery: RecoveryConfig | Mapping[str, Any] | None = None,
        telemetry: TelemetryConfig | Mapping[str, Any] | None = None,
        replication: ReplicationConfig | Mapping[str, Any] | None = None,
        membership: MembershipConfig | Mapping[str, Any] | None = None,
        persistent: PersistentConfig | Mapping[str, Any] | None = None,
        faults: list[FaultConfig] | None = None,
        **kwargs: Any,
    ) -> None:
        checks.ddp_arguments(kwargs)
        super().__init__(**kwargs)
        self._init_gemini(snapshot=snapshot, recovery=recovery, telemetry=telemetry, replication=replication, membership=membership,
                          persistent=persistent, faults=faults)  # fmt: skip
        self._order: ReadyOrder | None = None
        self._layout: list[int] = []
        self._wrapped: list[bool] = []
        """Which parameters trained when DDP was set up: these it synchronizes."""
        self._own: set[int] = set()
        """Numbers of the others that have trained since."""

    def _rebuilds(self) -> bool:
        return not self._ddp_kwargs.get("find_unused_parameters", False)

    def configure_ddp(self) -> None:
        """As Lightning's; the order of the first gradients is recorded, because it decides the layout of the buckets."""
        super().configure_ddp()
        assert isinstance(self.model, DistributedDataParallel)
        self._wrapped = super().wrapper_state()["trainable"]
        self._layout = []
        self._order = ReadyOrder(self.model) if self._rebuilds() else None

    def wrapper_state(self) -> dict[str, Any]:
        """The order of the first synchronized backward, what DDP synchronizes, whether the next forward broadcasts buffers (not so after
        a validation)."""
        flags = {flag: getattr(self.model, flag) for flag in _DDP_FLAGS}
        own = {"wrapped": list(self._wrapped), "own": sorted(self._own)}
        return super().wrapper_state() | {"order": list(self._layout), **own, **flags}

    def unsynchronized(self) -> set[int]:
        """Parameters that were frozen when DDP was set up and train now (BaseFinetuning): DDP leaves them alone, so ranks differ."""
        assert self.lightning_module is not None
        parameters = list(self.lightning_module.parameters())
        flags = zip(parameters, self._wrapped, strict=bool(self._wrapped))
        self._own |= {number for number, (p, wrapped) in enumerate(flags) if p.requires_grad and not wrapped}
        return {id(parameters[number]) for number in self._own}

    def _begin_backward(self) -> None:
        if self._order is not None:
            self._order.restart()

    def _end_backward(self) -> None:
        """DDP would rebuild its buckets, with a broadcast, in the next forward; a rank replaced before that could not take part."""
        if self._order is None or not self._order.complete:
            return
        assert isinstance(self.model, DistributedDataParallel)
        order = torch.tensor(self._order.freeze())
        dist.broadcast(order, 0)  # as DDP: the order on rank 0 counts
        self._layout, self._order = order.tolist(), None
        self.model.reducer._rebuild_buckets()

    def reset_after_abort(self, *, own_fault: bool, wrapper: dict[str, Any]) -> None:
        """Survivors keep their reducer, which has finished in good order; otherwise a new wrapper is brought to the same layout."""
        if own_fault or (self._rebuilds() and not wrapper["order"]):
            assert self.lightning_module is not None
            set_trainable(self.lightning_module, wrapper["wrapped"])  # in a second `fit` others may train when DDP is set up
            self._wrap_anew(wrapper["order"])
        super().reset_after_abort(own_fault=own_fault, wrapper=wrapper)
        self._own = set(wrapper["own"])
        for flag in _DDP_FLAGS:
            setattr(self.model, flag, wrapper[flag])

    def _wrap_anew(self, layout: list[int]) -> None:
        assert self.lightning_module is not None
        compat.drop_redirection(self.lightning_module)
        old = weakref.ref(self.model)
        self.model = self.lightning_module
        if old() is not None:  # the old reducer's hooks must go with it; a backward that was cut short may hold it in a cycle
            gc.collect()
        with self.alone():
            self.configure_ddp()
            if layout:
                assert isinstance(self.model, DistributedDataParallel) and self._order is not None
                self._order.freeze()
                self._order, self._layout = None, list(layout)
                impose_layout(self.model, layout)


class GeminiFSDP2Strategy(Joining, ModelParallelStrategy):
    """Lightning's ModelParallelStrategy (FSDP2, tensor parallelism) with recovery.

    Nobody else holds a rank's shards: they are committed to the node's memory before the step returns.
    """

    strategy_name = "gemini_fsdp2"
    replicated = False

    def __init__(
        self,
        *,
        snapshot: SnapshotConfig | Mapping[str, Any] | None = None,
        recovery: RecoveryConfig | Mapping[str, Any] | None = None,
        telemetry: TelemetryConfig | Mapping[str, Any] | None = None,
        replication: ReplicationConfig | Mapping[str, Any] | None = None,
        membership: MembershipConfig | Mapping[str, Any] | None = None,
        persistent: PersistentConfig | Mapping[str, Any] | None = None,
        faults: list[FaultConfig] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._init_gemini(snapshot=snapshot, recovery=recovery, telemetry=telemetry, replication=replication, membership=membership,
                          persistent=persistent, faults=faults)  # fmt: skip

    def reset_after_abort(self, *, own_fault: bool, wrapper: dict[str, Any]) -> None:
        """FSDP2 resets itself."""
        super().reset_after_abort(own_fault=own_fault, wrapper=wrapper)
        if self.lightning_module is not None:
            reset_fsdp(self.lightning_module)
            reshard_fsdp(self.lightning_module)

    def before_step(self) -> None:
        """See `compat.torch.reshard_fsdp`."""
        assert self.lightning_module is not None
        reshard_fsdp(self.lightning_module)


def register() -> None:
    """Make `Trainer(strategy="gemini")` and `"gemini_fsdp2"` known."""
    from lightning.pytorch.strategies import StrategyRegistry

    for cls in (GeminiStrategy, GeminiFSDP2Strategy):
        if cls.strategy_name not in StrategyRegistry:
            StrategyRegistry.register(cls.strategy_name, cls, description=(cls.__doc__ or "").splitlines()[0])
