"""NeMo's MegatronStrategy with recovery.

`hooks` holds what all our Strategies do; here is what Megatron does otherwise. Who holds which bytes follows from the parallel sizes
(`parallel`, `tensors`). A step fetches its own micro-batches, so they are kept for its repetition (`batches`). Groups are made by Megatron
through `torch.distributed.new_group`, and are swappable like all others; Megatron itself is not initialised anew in a recovery.

Failure: sizes that do not fit, or settings that cannot be repeated -> `ValueError` from the constructor, the launcher or `setup`, before
the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from nemo.lightning.pytorch.strategies import MegatronStrategy
from nemo.lightning.pytorch.strategies.utils import init_model_parallel, setup_parallel_ranks

from lightning_gemini import checks, faults
from lightning_gemini.compat import lightning as compat
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
from lightning_gemini.mapped.loader import MappedLoader
from lightning_gemini.nemo import rank_state, reset, transforms
from lightning_gemini.nemo.batches import Batches
from lightning_gemini.nemo.checks import require_no_evaluation
from lightning_gemini.nemo.parallel import Parallel
from lightning_gemini.nemo.tensors import Tensors, inner_optimizers, megatron_optimizers
from lightning_gemini.state.catalogue import Entry, layout


class GeminiMegatronStrategy(Joining, MegatronStrategy):  # type: ignore[misc]
    """NeMo's MegatronStrategy (tensor, pipeline, context, expert and data parallelism) with recovery.

    Args:
        snapshot, recovery, telemetry, replication, membership, persistent, faults: see `lightning_gemini.config`; a dataclass or a mapping
            each. The others are MegatronStrategy's.
    """

    strategy_name = "gemini_megatron"
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
        checks.known_arguments("GeminiMegatronStrategy", kwargs, MegatronStrategy)
        MegatronStrategy.__init__(self, **kwargs)
        self._init_gemini(snapshot=snapshot, recovery=recovery, telemetry=telemetry, replication=replication, membership=membership,
                          persistent=persistent, faults=faults)  # fmt: skip
        self._require_repeatable()
        self._batches = Batches()
        self._transforms: list[Any] = []
        self.inner_optimizers = inner_optimizers
        """See `compat.lightning.unwrap_optimizers`."""

    def _require_repeatable(self) -> None:
        if self.config.persistent.url:
            raise ValueError(
                f"persistent.url={self.config.persistent.url!r} is not supported with Megatron, whose checkpoints have a format of their "
                "own: leave it out and use NeMo's ModelCheckpoint and AutoResume for storage"
            )
        for key in ("virtual_pipeline_model_parallel_size", "_fsdp"):
            if getattr(self, key, None) is not None:
                name = key.strip("_")
                raise ValueError(f"{name}={getattr(self, key)!r} is not supported with recovery: set {name}=null")

    # ---- where this rank is

    @property
    def parallel(self) -> Parallel:
        """The parallel sizes over the world of this job."""
        return Parallel(
            world=checks.world_of(self),
            tp=self.tensor_model_parallel_size,
            pp=self.pipeline_model_parallel_size,
            cp=self.context_parallel_size,
            ep=self.expert_model_parallel_size,
            etp=self.expert_tensor_parallel_size or 0,
            instances=self.num_distributed_optimizer_instances,
            pp_before_dp=self.use_tp_pp_dp_mapping,
        )

    def _configure_launcher(self) -> None:
        _ = self.parallel  # refuses sizes that do not fit, before a process is started
        super()._configure_launcher()

    def setup(self, trainer: pl.Trainer) -> None:
        """As NeMo's, then what our Strategies add."""
        if trainer.state.fn == "fit" and trainer.enable_validation:
            require_no_evaluation(self.parallel, trainer.limit_val_batches)
        super().setup(trainer)

    def setup_distributed(self) -> None:
        """As NeMo's, which returns at once where the default group exists: ours is there already."""
        setup_parallel_ranks(self)
        self.set_world_ranks()
        self._process_group_backend = "gemini"
        init_model_parallel(self.model)
        if self.data_sampler:
            self.data_sampler.setup(self.cluster_environment.global_rank())

    # ---- what the state is

    @property
    def _distributed(self) -> bool:
        return bool(getattr(self.ddp_config, "use_distributed_optimizer", False))

    @property
    def _tensors(self) -> Tensors:
        return Tensors(self.parallel, self.world.rank, distributed=self._distributed)

    def has_donors(self) -> bool:
        """Where data (and context) parallel ranks are on one node, and the optimizer's state is not sharded over all of them."""
        parallel, per_node = self.parallel, self.num_processes
        groups = (parallel.replicas(rank, sharded=self._distributed) for rank in range(parallel.world))
        return all(sum(other // per_node == rank // per_node for other in group) > 1 for rank, group in enumerate(groups))

    def catalogue(self, optimizers: list[torch.optim.Optimizer]) -> list[Entry]:
        """See `nemo.tensors`."""
        assert self.lightning_module is not None
        return self._tensors.entries(self.lightning_module, optimizers)

    def check_layout(self) -> None:
        """Ranks of a pipeline stage have built the same model."""
        mine = (self.parallel.stage(self.world.rank), layout(self.catalogue([])))
        others: list[Any] = [None] * self.world.size
        dist.all_gather_object(others, mine)
        for rank, (stage, theirs) in enumerate(others):
            first = next(known for known in others if known[0] == stage)
            if theirs != first[1]:
                raise ValueError(
                    f"rank {rank} of pipeline stage {stage} does not hold parameters of the same names, shapes and types as the rest of "
                    "its stage: build the model alike on all ranks"
                )

    def _start_engine(self, trainer: pl.Trainer) -> None:
        """Not yet, where the model will get adapters; see `nemo.transforms`."""
        self._transforms = transforms.waiting(trainer)
        if not self._transforms:
            super()._start_engine(trainer)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """As the others'; at the one before the loops start, all weights are loaded."""
        if self._transforms and (args[0] if args else kwargs.get("name")) == "run-stage":
            callbacks, self._transforms = self._transforms, []
            transforms.apply(callbacks, self._trainer, again=self.engine is not None)
            super()._start_engine(self._trainer)
        super().barrier(*args, **kwargs)

    def _make_engine(self, trainer: pl.Trainer) -> None:
        super()._make_engine(trainer)
        assert self.engine is not None
        self.engine.memory.label_of = lambda name: self._tensors.label(name, compat.unwrap_optimizers(trainer))

    def rank_state(self) -> dict[str, Any]:
        """See `nemo.rank_state`, and what the loop has fetched."""
        held = rank_state.capture(megatron_optimizers(self.optimizers), self.data_sampler)
        return held | {"fetcher": compat.capture_fetcher(self._trainer)}

    def restore_rank_state(self, state: dict[str, Any]) -> None:
        """Inverse of `rank_state`."""
        rank_state.restore(state, megatron_optimizers(self.optimizers), self.data_sampler)
        compat.restore_fetcher(self._trainer, state["fetcher"])

    # ---- a step

    def optimizer_step(self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """The step that can be repeated."""
        self._batches.forget()
        return super().optimizer_step(optimizer, closure, model, **kwargs)

    def training_step(self, dataloader_iter: Any, *args: Any, **kwargs: Any) -> Any:
        """Forward and backward of all micro-batches."""
        with _on_first_gradient(self):
            return super().training_step(self._batches.of(dataloader_iter), *args, **kwargs)

    def _end_backward(self) -> None:
        """The step has been written."""
        reset.settle(self.megatron_parallel)

    def reset_after_abort(self, *, own_fault: bool, wrapper: dict[str, Any]) -> None:
        """See `nemo.reset`."""
        super().reset_after_abort(own_fault=own_fault, wrapper=wrapper)
        reset.reset(self.megatron_parallel, self.timers)

    # ---- the rest

    def process_dataloader(self, dataloader: Any) -> Any:
        """As the others', but NeMo's steps fetch for themselves, which mapped data do not serve."""
        if isinstance(dataloader, MappedLoader):
            raise ValueError("mapped_data is not supported with MegatronStrategy, whose steps fetch their own micro-batches: leave it out")
        return super().process_dataloader(dataloader)

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As NeMo's: nothing of ours is in its checkpoints."""
        return MegatronStrategy.load_checkpoint(self, checkpoint_path, *args, **kwargs)  # type: ignore[no-any-return]


class _on_first_gradient:
    """Injects a fault of place "backward" (see `faults`): Megatron calls backward itself."""

    def __init__(self, strategy: GeminiMegatronStrategy) -> None:
        self._strategy = strategy
        self._hook: Any = None

    def __enter__(self) -> None:
        if faults.armed(self._strategy, "backward"):
            parameter = next(p for p in self._strategy.lightning_module.parameters() if p.requires_grad)
            self._hook = parameter.register_hook(lambda grad: faults.fire(self._strategy, "backward"))

    def __exit__(self, *_: Any) -> None:
        if self._hook is not None:
            self._hook.remove()
