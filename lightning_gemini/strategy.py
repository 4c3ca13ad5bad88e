"""The Strategies: how a rank joins, steps and recovers, over Lightning's own DDP and FSDP2.

One mixin holds everything; the two classes say which tensors all ranks share. Seam to Lightning: `_configure_launcher`,
`setup_environment`, `setup`, `barrier("run-stage")`, `on_train_start`, `process_dataloader`, `training_step`, `optimizer_step`,
`broadcast`. In automatic optimization a step is `optimizer_step` (its closure is repeated); in manual optimization it is
`training_step` (the user's own sequence of writes is repeated as a whole).

What fails here fails before the first step, with one error: one device, an optimizer that cannot be restored, a feature that cannot be
repeated, ranks that hold different parameters, no memory for two slots.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.nn.parallel import DistributedDataParallel

from lightning_gemini import checks, faults
from lightning_gemini.agent.memory import END_AT
from lightning_gemini.agent.messages import Fault, Hello, Left, Recovered, Waiting
from lightning_gemini.compat import lightning as compat
from lightning_gemini.compat import loggers
from lightning_gemini.compat.torch import ReadyOrder, impose_layout, keep_groups_swappable, reset_fsdp, reshard_fsdp
from lightning_gemini.config import FaultConfig, GeminiConfig, RecoveryConfig, SnapshotConfig, TelemetryConfig, parse
from lightning_gemini.data.position import PositionedLoader
from lightning_gemini.environment import GeminiEnvironment
from lightning_gemini.launcher import GeminiLauncher
from lightning_gemini.recovery.engine import Engine
from lightning_gemini.recovery.landing import Landing
from lightning_gemini.recovery.memory import Memory, expected_size
from lightning_gemini.rendezvous import group
from lightning_gemini.rendezvous.link import Link
from lightning_gemini.rendezvous.world import Mode, World
from lightning_gemini.snapshot.slots import CorruptSnapshot, SlotFile
from lightning_gemini.state.catalogue import Entry, catalogue, local, parameters_of, size_of
from lightning_gemini.state.local import Kind, LocalState
from lightning_gemini.telemetry import banner
from lightning_gemini.telemetry.events import EventLog

_WAIT_FOR_END_S = 30.0
_DDP_FLAGS = ("require_forward_param_sync", "require_backward_grad_sync")
_process: dict[str, Any] = {}
"""The link and world of this process: they outlive a strategy, because a script may call `fit` more than once."""


class GeminiMixin:
    """Recovery for a Lightning strategy whose ranks are processes of one node."""

    replicated = True
    """Whether all ranks hold the same parameters and optimizer state."""

    config: GeminiConfig
    loader_positions: list[dict[str, Any]]

    def _init_gemini(
        self,
        snapshot: SnapshotConfig | Mapping[str, Any] | None,
        recovery: RecoveryConfig | Mapping[str, Any] | None,
        telemetry: TelemetryConfig | Mapping[str, Any] | None,
        faults_: list[FaultConfig] | None,
    ) -> None:
        values = {"snapshot": snapshot, "recovery": recovery, "telemetry": telemetry, "faults": faults_}
        self.config = parse(GeminiConfig, {key: value for key, value in values.items() if value is not None})
        self.cluster_environment = GeminiEnvironment()
        self.loader_positions = []
        self.engine: Engine | None = None
        self.landing: Landing | None = None
        self.events: EventLog | None = None
        self.recoveries: list[Recovered] = []
        """Recoveries of this job that this rank has been told of, oldest first."""
        self._accumulating = False
        """Automatic optimization: gradients hold something that the optimizer has not used yet."""
        self._used: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        """Manual optimization: the gradients (by id of their parameter), with version, that an optimizer has used."""

    # ---- joining

    def _configure_launcher(self) -> None:
        self._launcher = GeminiLauncher(self, checks.world_of(self))

    def connect_to_agent(self, trainer: pl.Trainer) -> None:
        """First thing in `fit`: tell the agent that this process is there."""
        if "link" not in _process:
            _process["link"] = Link()
            _process["world"] = World(_process["link"], self.config.recovery.collective_timeout_s)
            group.register(lambda: _process["world"])  # type: ignore[no-any-return]
        link = self.link
        link.on_recover, link.on_recovered = self._on_recover, self._on_recovered
        self._loggers = trainer.loggers
        try:
            checks.same_world(link.world, checks.world_of(self))
            self._directory = self.check_directory(trainer)
        except ValueError as error:
            self.give_up(error)
            raise
        link.send(Hello(pid=os.getpid(), config=asdict(self.config) | {"replicated": self.replicated}, directory=self._directory))

    def check_directory(self, trainer: pl.Trainer) -> str:
        """The folder of the event files; also asked before the first process is started."""
        directory = self.config.telemetry.directory or os.path.join(trainer.default_root_dir, "gemini")
        checks.writable(directory, "telemetry.directory")
        return os.path.abspath(directory)

    @property
    def link(self) -> Link:
        """The connection to the agent."""
        return _process["link"]  # type: ignore[no-any-return]

    @property
    def world(self) -> World:
        """What this process's groups share."""
        return _process["world"]  # type: ignore[no-any-return]

    def _on_recover(self) -> None:  # in the listening thread
        landing = self.landing
        if landing is not None:
            landing.answer()
        self.world.free()

    def _on_recovered(self, message: Recovered) -> None:  # in the listening thread
        self.recoveries.append(message)

    def setup_environment(self) -> None:
        """Take a rank (a spare waits for one here) and make the default group."""
        link, environment = self.link, self.cluster_environment
        assert isinstance(environment, GeminiEnvironment)
        if link.rank is None:
            self.landing = Landing(link)
            link.send(Waiting())
            link.wait(lambda: link.rank is not None, float(2**31), "a rank")
            self.world.generation = link.announced
        environment.rank = link.rank
        self.set_world_ranks()  # type: ignore[attr-defined]
        if self.landing is not None:
            self.world.mode = Mode.STAND_IN
            self._continue_loggers()
        if self.events is None:
            self.events = EventLog(self._directory, f"rank{link.rank}", os.environ["LIGHTNING_GEMINI_JOB"])
            self.events.emit("joined", rank=link.rank, spare=self.landing is not None, generation=link.announced)
        if not dist.is_initialized():
            reset_seed()
            dist.init_process_group("gemini", store=dist.HashStore(), rank=self.world.rank, world_size=self.world.size)
            keep_groups_swappable()
        super().setup_environment()  # type: ignore[misc]

    def _continue_loggers(self) -> None:
        """In the folders that rank 0 has opened; whoever looked for the next free one would find another."""
        ledger = SlotFile(self.link.files.ledgers[0])
        try:
            for slot in reversed(ledger.slots()):
                with contextlib.suppress(CorruptSnapshot):  # rank 0 may be alive, and write another
                    loggers.continue_versions(self._loggers, LocalState.logger_versions(ledger.read(slot)))
                    return
        finally:
            ledger.close()

    def setup(self, trainer: pl.Trainer) -> None:
        """Lightning's set-up, then ours: memory, engine, callback."""
        if trainer.state.fn != "fit":
            super().setup(trainer)  # type: ignore[misc]
            return
        checks.trainer(self, trainer)
        if self.landing is None:
            checks.same_layout(catalogue(self.lightning_module, [], replicated=self.replicated), self.replicated)  # type: ignore[attr-defined]
        self._attach_callback(trainer)
        super().setup(trainer)  # type: ignore[misc]
        for optimizer in compat.unwrap_optimizers(trainer):
            checks.optimizer(optimizer)
            optimizer.register_step_pre_hook(self._gate)
            optimizer.register_step_post_hook(self._note_used)
        self._trainer = trainer
        self._make_engine(trainer)

    def _attach_callback(self, trainer: pl.Trainer) -> None:
        from lightning_gemini.callback import GeminiCallback

        if not any(isinstance(callback, GeminiCallback) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            trainer.callbacks.append(GeminiCallback())  # type: ignore[attr-defined]
        if self.config.faults and not any(isinstance(callback, faults.FaultCallback) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            trainer.callbacks.append(faults.FaultCallback(self))  # type: ignore[attr-defined]

    def _make_engine(self, trainer: pl.Trainer) -> None:
        entries = self.entries()
        optimizers = compat.unwrap_optimizers(trainer)
        if self.engine is not None:
            self.engine.memory.close()
        memory = Memory(self.link, self.config.snapshot, self.entries, lambda: compat.unwrap_optimizers(trainer))
        accumulating = trainer.accumulate_grad_batches > 1 or not self.lightning_module.automatic_optimization  # type: ignore[attr-defined]
        gradients = size_of(entries) if accumulating else 0
        need = expected_size(entries, optimizers, self.world.rank, self.world.size)
        memory.allocate(need, gradients)
        self.engine = Engine(self.world, self.config, memory, LocalState(trainer, self.engine and self.engine.local), self)  # type: ignore[arg-type]
        self.world.log = memory.log
        self.world.stand_still = self.engine.stand_still
        if self.landing is None and self.config.telemetry.banner and self.world.rank == 0:
            banner.show(self.config, self.world.size, need, self.replicated)

    def entries(self) -> list[Entry]:
        """The live tensors of the state."""
        return catalogue(self.lightning_module, compat.unwrap_optimizers(self._trainer), replicated=self.replicated)  # type: ignore[attr-defined]

    # ---- collectives

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """As Lightning's; the one before the loops start is where a replaced rank finds its place."""
        name = args[0] if args else kwargs.get("name")
        landing = self.landing
        if name == "run-stage" and landing is not None and landing.boundary is None and self.engine is not None:
            landing.position(self.engine)
            assert landing.boundary is not None
            self._trainer.num_sanity_val_steps = 0  # its peers did that long ago
        super().barrier(*args, **kwargs)  # type: ignore[misc]

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """As Lightning's; nobody is there to receive from while a replaced rank sets itself up."""
        if dist.is_initialized() and self.world.mode is Mode.STAND_IN:
            return obj
        return super().broadcast(obj, src)  # type: ignore[misc]

    def form_groups(self) -> None:
        """Form the default group of the present generation, so that the first collective does not have to."""
        default = dist.group.WORLD
        assert isinstance(default, group.SwappableGroup)
        default.inner("cuda" if self.root_device.type == "cuda" else "cpu")  # type: ignore[attr-defined]

    # ---- data

    def process_dataloader(self, dataloader: Any) -> Any:
        """Training loaders know their position; a replaced rank's begin at its predecessor's."""
        dataloader = super().process_dataloader(dataloader)  # type: ignore[misc]
        if not getattr(self, "_trainer", None) or not self._trainer.training or isinstance(dataloader, PositionedLoader):
            return dataloader
        loader = PositionedLoader(dataloader)
        if self.loader_positions:
            loader.begin_at(self.loader_positions.pop(0))
        return loader

    # ---- steps

    def on_train_start(self) -> None:
        """The first boundary."""
        super().on_train_start()  # type: ignore[misc]
        assert self.engine is not None
        if self.landing is None:
            self.engine.start(self._trainer.global_step)
        elif self.landing.boundary is not None and self.landing.boundary.kind is Kind.START:
            self._land()

    def _land(self) -> Any:
        assert self.landing is not None and self.engine is not None
        boundary = self.landing.land(self.engine)
        self.landing = None
        self.emit("landed", step=boundary.step, kind=boundary.kind.name)
        return boundary

    def _gate(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of every optimizer step: the engine's gate comes after the closure and before the first write."""
        engine = self.engine
        if engine is None or not engine.in_step:
            return None
        positional = len(args) > 1  # args[0] is the optimizer
        closure = args[1] if positional else kwargs.get("closure")
        if closure is None:
            self._before_write(engine)
            return None

        @functools.wraps(closure)
        def gated() -> Any:
            result = closure()
            self._before_write(engine)
            return result

        return ((args[0], gated, *args[2:]), kwargs) if positional else (args, {**kwargs, "closure": gated})

    def _before_write(self, engine: Engine) -> None:
        engine.gate()
        self._accumulating = False
        faults.fire(self, "optimizer")

    def _note_used(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Post-hook of every optimizer step."""
        if not self.lightning_module.automatic_optimization:  # type: ignore[attr-defined]
            grads = ((id(parameter), parameter.grad) for parameter in parameters_of(optimizer))
            self._used |= {key: (weakref.ref(grad), grad._version) for key, grad in grads if grad is not None}

    def _unused(self, parameter: torch.Tensor) -> bool:
        reference, version = self._used.get(id(parameter), (lambda: None, -1))
        return parameter.grad is not None and (reference() is not parameter.grad or version != parameter.grad._version)

    def optimizer_step(self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Automatic optimization: the step that can be repeated."""
        engine = self.engine
        if engine is None or not self.lightning_module.automatic_optimization:  # type: ignore[attr-defined]
            return super().optimizer_step(optimizer, closure, model, **kwargs)  # type: ignore[misc]

        def checked() -> Any:
            self._begin_backward()
            result = closure()
            engine.check()  # before clipping sees sums that were never completed
            return result

        def attempt() -> Any:
            out = super(GeminiMixin, self).optimizer_step(optimizer, checked, model, **kwargs)  # type: ignore[misc]
            self._accumulating = False  # also where a gradient scaler has skipped the write
            self._end_backward()
            return out

        return self._step(attempt, lambda out: (detached(out), detached(compat.closure_result(closure))), closure)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Manual optimization: the step that can be repeated is the whole training_step."""
        if self.engine is None or self.lightning_module.automatic_optimization:  # type: ignore[attr-defined]
            faults.fire(self, "forward")
            return super().training_step(*args, **kwargs)  # type: ignore[misc]

        def attempt() -> Any:
            self._begin_backward()
            faults.fire(self, "forward")
            out = super(GeminiMixin, self).training_step(*args, **kwargs)  # type: ignore[misc]
            self._end_backward()
            return out

        return self._step(attempt, lambda out: (detached(out), None), None)

    def backward(self, closure_loss: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As Lightning's."""
        if faults.armed(self, "backward"):
            closure_loss.register_hook(lambda grad: faults.fire(self, "backward"))
        loss = super().backward(closure_loss, *args, **kwargs)  # type: ignore[misc]
        self._accumulating = True
        return loss  # type: ignore[no-any-return]

    def _step(self, attempt: Callable[[], Any], result_of: Callable[[Any], Any], closure: Any) -> Any:
        engine = self.engine
        assert engine is not None
        if self.landing is not None:
            boundary = self._land()
            if boundary.kind is Kind.EXIT:
                out, result = boundary.result
                compat.set_closure_result(closure, result)
                return out
            return engine.repeat(attempt, result_of)
        return engine.run(attempt, result_of)

    def _begin_backward(self) -> None:
        """Hook for DDP's record of the order of gradients."""

    def _end_backward(self) -> None:
        """Hook for DDP's record of the order of gradients; inside the step, so that the boundary it leads to has the record."""

    def asked_to_end(self) -> bool:
        """Whether the agent wants the job to end after this step."""
        last = self.link.board.get(self.world.rank, END_AT)
        return bool(last) and self.engine is not None and self.engine.step >= last

    def emit(self, event: str, **fields: Any) -> None:
        """Telemetry."""
        if self.events is not None:
            self.events.emit(event, rank=self.link.rank, **fields)

    # ---- the wider circle

    def reenter(self, trainer: pl.Trainer, error: Exception | None) -> bool:
        """Prepare to enter `fit` again in this process. False when the error must reach the user."""
        engine = self.engine
        if engine is None or engine.step < 0:
            if error is not None:
                self.give_up(error)
            return error is None
        engine.memory.settle()
        self.landing = Landing(self.link)
        if error is not None:
            generation = self.world.generation
            engine.report(error, "a callback, the data or validation")
            self.link.wait(lambda: self.link.announced != generation, self.config.recovery.regroup_timeout_s, "the agent to begin a recovery")
            error.__traceback__ = error.__context__ = None
        self.world.generation = self.link.announced
        self.landing.answer()
        self.world.mode, self.world.error = Mode.STAND_IN, None
        self.world.replay.clear()
        engine.in_step = False
        self.world.stand_still = engine.stand_still
        compat.forget_loaders(trainer)
        self.loader_positions = []
        self.model = self.lightning_module  # type: ignore[attr-defined]
        trainer.state.status = trainer.state.status.__class__.RUNNING
        trainer.training = True
        return True

    def give_up(self, error: BaseException) -> None:
        """Tell the agent that the job must end with this error; it ends this process, so that the error is shown once."""
        text = "".join(traceback.format_exception(error))
        self.link.send(Fault(generation=self.link.announced, step=-1, where="set-up", error=text, recoverable=False))
        with contextlib.suppress(TimeoutError):
            self.link.wait(lambda: False, _WAIT_FOR_END_S, "the agent to end the job")

    def left_fit(self) -> None:
        """`fit` has returned."""
        if self.engine is not None:
            dist.barrier()  # together: a rank that dies after its last step is still replaced, and finishes what follows it
            self.engine.memory.settle()
            self.engine.report_resumed()
            self.engine.finished = True
        self.emit("left_fit")
        self.link.send(Left())

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Collectives answer alone."""
        mode, self.world.mode = self.world.mode, Mode.STAND_IN
        try:
            yield
        finally:
            self.world.mode = mode

    def gradients(self) -> list[torch.Tensor | None] | None:
        """See `recovery.engine.Host`."""
        module = self.lightning_module  # type: ignore[attr-defined]
        kept = self._accumulating if module.automatic_optimization else any(map(self._unused, module.parameters()))
        return [None if p.grad is None else local(p.grad) for p in module.parameters()] if kept else None

    def set_gradients(self, gradients: list[torch.Tensor | None] | None) -> None:
        """See `recovery.engine.Host`."""
        self._accumulating = gradients is not None
        parameters = list(self.lightning_module.parameters())  # type: ignore[attr-defined]
        for parameter, saved in zip(parameters, gradients or [None] * len(parameters), strict=True):
            parameter.grad = None
            if saved is not None:
                parameter.grad = torch.zeros_like(parameter)
                local(parameter.grad).copy_(saved)

    def before_step(self) -> None:
        """See `recovery.engine.Host`; only FSDP2 has something to do."""

    def wrapper_state(self) -> dict[str, Any]:
        """See `recovery.engine.Host`: which parameters train (`toggle_optimizer` changes it within a step); DDP has more."""
        return {"trainable": [parameter.requires_grad for parameter in self.lightning_module.parameters()]}  # type: ignore[attr-defined]

    def reset_after_abort(self, *, own_fault: bool, wrapper: dict[str, Any]) -> None:
        """See `recovery.engine.Host`."""
        set_trainable(self.lightning_module, wrapper["trainable"])  # type: ignore[attr-defined]


class GeminiStrategy(GeminiMixin, DDPStrategy):
    """Lightning's DDP with recovery. Keyword arguments other than ours are DDPStrategy's and DistributedDataParallel's.

    Args:
        snapshot, recovery, telemetry, faults: see `lightning_gemini.config`; a dataclass or a mapping each.
    """

    strategy_name = "gemini"

    def __init__(
        self,
        *,
        snapshot: SnapshotConfig | Mapping[str, Any] | None = None,
        recovery: RecoveryConfig | Mapping[str, Any] | None = None,
        telemetry: TelemetryConfig | Mapping[str, Any] | None = None,
        faults: list[FaultConfig] | None = None,
        **kwargs: Any,
    ) -> None:
        checks.ddp_arguments(kwargs)
        super().__init__(**kwargs)
        self._init_gemini(snapshot, recovery, telemetry, faults)
        self._order: ReadyOrder | None = None
        self._layout: list[int] = []
        self._wrapped: list[bool] = []
        """Which parameters trained when DDP was set up: these it synchronizes."""

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
        """The order of the first synchronized backward, and whether the next forward broadcasts buffers (not so after a validation)."""
        flags = {flag: getattr(self.model, flag) for flag in _DDP_FLAGS}
        return super().wrapper_state() | {"order": list(self._layout), **flags}

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
            set_trainable(self.lightning_module, self._wrapped)
            self._wrap_anew(wrapper["order"])
        super().reset_after_abort(own_fault=own_fault, wrapper=wrapper)
        for flag in _DDP_FLAGS:
            setattr(self.model, flag, wrapper[flag])

    def _wrap_anew(self, layout: list[int]) -> None:
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


class GeminiFSDP2Strategy(GeminiMixin, ModelParallelStrategy):
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
        faults: list[FaultConfig] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._init_gemini(snapshot, recovery, telemetry, faults)

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


def set_trainable(model: torch.nn.Module, flags: list[bool]) -> None:
    """Set `requires_grad` of every parameter."""
    for parameter, flag in zip(model.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)


def detached(value: Any) -> Any:
    """A copy of nested results without graphs."""
    return torch.utils._pytree.tree_map(lambda item: item.detach().clone() if isinstance(item, torch.Tensor) else item, value)


def register() -> None:
    """Make `Trainer(strategy="gemini")` and `"gemini_fsdp2"` known."""
    from lightning.pytorch.strategies import StrategyRegistry

    for cls in (GeminiStrategy, GeminiFSDP2Strategy):
        if cls.strategy_name not in StrategyRegistry:
            StrategyRegistry.register(cls.strategy_name, cls, description=(cls.__doc__ or "").splitlines()[0])

