"""Fault injection, for drills and tests. Off unless `faults` is configured.

A fault is data: kind, rank, step, place. It fires once in the life of the job: the first process that reaches it leaves a mark in the
job's shared memory, so that its replacement passes. Each is counted in the telemetry before it happens; a test asserts that count.
"""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

from lightning_gemini.agent.memory import FAULT_NS, FAULTS_FIRED
from lightning_gemini.config import FaultConfig

if TYPE_CHECKING:
    from lightning_gemini.hooks.base import GeminiBase


class InjectedFault(RuntimeError):
    """Raised by a fault of kind "raise"."""


def armed(strategy: GeminiBase, where: str) -> FaultConfig | None:
    """The fault that is due here and now, if it has not fired yet."""
    if not strategy.config.faults or strategy.landing is not None or strategy.engine is None:
        return None
    for number, fault in enumerate(strategy.config.faults):
        if (fault.where, fault.rank, fault.step) == (where, strategy.world.rank, strategy.engine.step) and not _fired(strategy, number):
            return fault
    return None


def fire(strategy: GeminiBase, where: str) -> None:
    """Inject the fault that is due here and now."""
    fault = armed(strategy, where)
    if fault is None:
        return
    _mark(strategy, strategy.config.faults.index(fault))
    strategy.emit("fault_injected", kind=fault.kind, step=fault.step, where=where)
    strategy.link.board.set(strategy.link.place(strategy.world.rank), FAULT_NS, time.monotonic_ns())
    if fault.kind == "raise":
        raise InjectedFault(f"injected into rank {fault.rank}, step {fault.step}, {where}")
    if fault.kind == "exit":
        os._exit(17)
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "segv": signal.SIGSEGV}[fault.kind])


def _fired(strategy: GeminiBase, number: int) -> bool:
    return bool(strategy.link.board.get(strategy.link.place(strategy.world.rank), FAULTS_FIRED) >> number & 1)


def _mark(strategy: GeminiBase, number: int) -> None:
    fired = strategy.link.board.get(strategy.link.place(strategy.world.rank), FAULTS_FIRED)
    strategy.link.board.set(strategy.link.place(strategy.world.rank), FAULTS_FIRED, fired | 1 << number)


class FaultCallback(pl.Callback):
    """The places between steps."""

    def __init__(self, strategy: GeminiBase) -> None:
        self._strategy = strategy

    def on_train_batch_start(self, *_: Any) -> None:
        """before_step."""
        fire(self._strategy, "before_step")

    def on_train_batch_end(self, *_: Any) -> None:
        """after_step, and callback."""
        fire(self._strategy, "after_step")
        fire(self._strategy, "callback")

    def on_validation_batch_start(self, *_: Any) -> None:
        """validation."""
        fire(self._strategy, "validation")
