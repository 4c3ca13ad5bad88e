"""The Callback: reports recoveries to the user's logger. The Strategy attaches one itself; listing it too changes nothing.

What decides about snapshots and recovery is in the Strategy, which a Trainer always has; a Callback alone could not do it.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lightning_gemini.compat import lightning as compat


class GeminiCallback(pl.Callback):
    """Writes `gemini/…` to the Trainer's loggers after each recovery."""

    def __init__(self) -> None:
        self._reported = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a Trainer without our strategy: nothing would be recovered."""
        from lightning_gemini.hooks.base import GeminiBase

        if not isinstance(trainer.strategy, GeminiBase):
            raise ValueError(
                f"callbacks has a GeminiCallback, but strategy={type(trainer.strategy).__name__} cannot recover: use strategy='gemini'"
            )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Report recoveries that have been completed since the last batch, and end where the agent asked for it."""
        trainer.strategy.persist(trainer)  # type: ignore[attr-defined]
        if trainer.strategy.asked_to_end():  # type: ignore[attr-defined]
            compat.end_after_this_step(trainer)
        recoveries = trainer.strategy.recoveries  # type: ignore[attr-defined]
        if not trainer.strategy.config.telemetry.log_to_logger:  # type: ignore[attr-defined]
            return
        while self._reported < len(recoveries):
            summary = recoveries[self._reported]
            self._reported += 1
            metrics = {f"gemini/{phase}_s": seconds for phase, seconds in summary.seconds.items()}
            metrics |= {"gemini/recovery_s": sum(summary.seconds.values()), "gemini/recoveries": float(summary.count)}
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Where the agent asked for the end, this rank's part of the last checkpoint is there before it ends, whoever ended it."""
        if isinstance(exception, SystemExit) and trainer.strategy.asked_to_end():  # type: ignore[attr-defined]
            trainer.strategy.persist(trainer)  # type: ignore[attr-defined]
            trainer.strategy.engine.memory.settle()  # type: ignore[attr-defined]
