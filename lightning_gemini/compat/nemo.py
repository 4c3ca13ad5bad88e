"""NeMo's `exp_manager` in processes that an agent has started. It was made for one process per rank, started once.

Why it is touched (no public way exists): its `check_resume` moves the log files of an earlier run away, and looks for the checkpoint to go
on from. A spare runs it in the middle of the training: a checkpoint that is being written would be an error there, and two of them another.
Its state comes from its peers. And rank 0 would move away what the process that the user started has just written.

NVIDIA's OneLogger, which NeMo attaches, measures one training loop per process: `on_train_start` raises in rank 0 where `fit` is entered
again. It is switched off then, in that process, as it switches itself off after an error.

Seam: `settle(…)`, before `exp_manager` is called, and `reenter()`, before `fit` is entered again; where NeMo is not imported, or has no
such thing, they do nothing.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

_MOVED = "LIGHTNING_GEMINI_NEMO_LOGS_MOVED"
"""Set in the process that the user started, and so in all that come from it."""


def settle(*, started_by_agent: bool, spare: bool) -> None:
    """Make `exp_manager` do in this process what belongs to its role. `spare`: it has no rank yet."""
    module = sys.modules.get("nemo.utils.exp_manager")
    original: Callable[..., Any] | None = getattr(module, "check_resume", None)
    if module is None or original is None or hasattr(original, "lightning_gemini"):
        return

    @functools.wraps(original)
    def check_resume(*args: Any, **kwargs: Any) -> Any:
        if spare:
            return None
        if started_by_agent and _MOVED in os.environ:
            return _without_moving(module, original, *args, **kwargs)
        found = original(*args, **kwargs)
        if not started_by_agent:
            os.environ[_MOVED] = "1"
        return found

    check_resume.lightning_gemini = True  # type: ignore[attr-defined]
    module.check_resume = check_resume  # type: ignore[attr-defined]


def _without_moving(module: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Only rank 0 moves files."""
    asked = module.is_global_rank_zero
    module.is_global_rank_zero = lambda: False
    try:
        return original(*args, **kwargs)
    finally:
        module.is_global_rank_zero = asked


def reenter() -> None:
    """Before `fit` is entered again in this process."""
    provider = getattr(sys.modules.get("nv_one_logger.api.one_logger_provider"), "OneLoggerProvider", None)
    if provider is not None and provider.instance().one_logger_enabled:
        provider.instance().force_disable_logging()
