"""NeMo's model transforms (LoRA and its kind), which put adapters around a model's layers after its weights were loaded.

NeMo applies them on entering the first epoch, and makes Megatron's buffers and the optimizers only then. Recovery must know the model that
is trained before: its first boundary comes earlier, and a replaced rank reads its boundary before it enters the loops. So they are applied
when everything is set up and loaded, at the barrier before the loops: through the same hook, which does nothing the second time.

A rank that enters `fit` again in its own process has its adapters already: what is left for the hook are buffers and optimizers.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from nemo.lightning.pytorch.callbacks.model_transform import ModelTransform


class _Done:
    """In place of a transform that was applied before; counts as NeMo's own wrapper does."""

    __num_calls__ = 0

    def __call__(self, model: Any) -> Any:
        self.__num_calls__ += 1
        return model


def waiting(trainer: pl.Trainer) -> list[Any]:
    """Callbacks that have a transform for this model."""
    return [callback for callback in trainer.callbacks if isinstance(callback, ModelTransform) and callback.model_transform is not None]  # type: ignore[attr-defined]


def apply(callbacks: list[Any], trainer: pl.Trainer, *, again: bool) -> None:
    """Apply them now. `again`: the model has its adapters."""
    for callback in callbacks:
        if again:
            callback.model_transform = _Done()
        callback.on_train_epoch_start(trainer, trainer.lightning_module)
