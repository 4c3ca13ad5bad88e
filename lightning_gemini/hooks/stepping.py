"""How a rank steps: which of Lightning's hooks is the step that can be repeated, and where its optimizer begins to write.

In automatic optimization a step is `optimizer_step` (its closure is repeated); in manual optimization it is `training_step` (the user's own
sequence of writes is repeated as a whole). The gate is a pre-hook of `optimizer.step`: after closure and clipping, before the first
write. What happens when each part of a step fails is in `recovery.engine`.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch

from lightning_gemini import faults
from lightning_gemini.compat import lightning as compat
from lightning_gemini.hooks.base import GeminiBase
from lightning_gemini.recovery.engine import Engine
from lightning_gemini.state.catalogue import local, parameters_of
from lightning_gemini.state.local import Kind


class Stepping(GeminiBase):
    """See the module's docstring."""

    def on_train_start(self) -> None:
        """The first boundary. Callbacks have had this hook, and have set the handlers that they want."""
        super().on_train_start()  # type: ignore[misc]
        self._on_sigterm = compat.take_sigterm(self._trainer)
        assert self.engine is not None
        if self.landing is None:
            self.engine.start(self._trainer.global_step)
        elif self.landing.boundary is not None and self.landing.boundary.kind is Kind.START:
            self._land()

    def _land(self) -> Any:
        assert self.landing is not None and self.engine is not None
        boundary = self.landing.land(self.engine)
        if self.landing.first:
            self._persisted = boundary.step  # it comes from there
        self.landing = None
        self.emit("landed", step=boundary.step, kind=boundary.kind.name, frozen_received=self.engine.memory.received)
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
            out = super(Stepping, self).optimizer_step(optimizer, checked, model, **kwargs)  # type: ignore[misc]
            self._accumulating = False  # also where a gradient scaler has skipped the write
            self._end_backward()
            return out

        return self._step(attempt, lambda out: (detached(out), detached(compat.closure_result(closure))), closure)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Manual optimization: the step that can be repeated is the whole training_step."""
        if self.engine is None or self.lightning_module.automatic_optimization:  # type: ignore[attr-defined]
            self.inputs.give(args, kwargs)
            faults.fire(self, "forward")
            return super().training_step(*args, **kwargs)  # type: ignore[misc]

        def attempt() -> Any:
            self._begin_backward()
            self.inputs.give(args, kwargs)
            faults.fire(self, "forward")
            out = super(Stepping, self).training_step(*args, **kwargs)  # type: ignore[misc]
            self._end_backward()
            return out

        return self._step(attempt, lambda out: (detached(out), None), None)

    def backward(self, closure_loss: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As Lightning's."""
        if faults.armed(self, "backward"):
            closure_loss.register_hook(lambda grad: faults.fire(self, "backward"))  # type: ignore[no-untyped-call]
        loss = super().backward(closure_loss, *args, **kwargs)  # type: ignore[misc]
        self._accumulating = True
        return loss  # type: ignore[no-any-return]

    def _step(self, attempt: Callable[[], Any], result_of: Callable[[Any], Any], closure: Any) -> Any:
        out = self._run(attempt, result_of, closure)
        if self.asked_to_end():  # before the hooks at the end of the batch, in which NeMo's PreemptionCallback saves and ends
            handlers, self._on_sigterm = self._on_sigterm, []
            compat.pass_sigterm_on(handlers)
        return out

    def _run(self, attempt: Callable[[], Any], result_of: Callable[[Any], Any], closure: Any) -> Any:
        engine = self.engine
        assert engine is not None
        run = engine.run
        if self.landing is not None:
            boundary, run = self._land(), engine.repeat
            if boundary.kind is Kind.EXIT:
                out, result = boundary.result
                compat.set_closure_result(closure, result)
                return out
        with self.inputs.step():
            return run(attempt, result_of)

    def _begin_backward(self) -> None:
        """Hook for DDP's record of the order of gradients."""

    def _end_backward(self) -> None:
        """Hook for DDP's record of the order of gradients; inside the step, so that the boundary it leads to has the record."""

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


def detached(value: Any) -> Any:
    """A copy of nested results without graphs."""
    return torch.utils._pytree.tree_map(lambda item: item.detach().clone() if isinstance(item, torch.Tensor) else item, value)


def set_trainable(model: torch.nn.Module, flags: list[bool]) -> None:
    """Set `requires_grad` of every parameter."""
    for parameter, flag in zip(model.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)
