"""Lightning's private corners, for versions 2.4 to 2.6.

Why each is needed (no public way exists):
    progress       loops have `load_state_dict`, but it also arms restart logic that would skip work when state is put back in mid-step.
    results        values of `self.log(on_epoch=True)` accumulate in `_results`; without them a replaced rank logs another epoch mean.
    metrics        `callback_metrics` are properties over dicts that only the logger connector writes.
    closure        a rank that lands after the optimizer's write returns the closure's result without running it again.
    dump           `trainer.save_checkpoint` gathers and copies all tensors; the persistent tier wants only the rest.
    re-entry       `fit` builds its loaders once and keeps them; a second entry in the same process must build them anew.
"""

from __future__ import annotations

import copy
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
from lightning.pytorch.loops.progress import _BaseProgress
from lightning.pytorch.trainer.connectors.signal_connector import _HandlersCompose
from torch import nn

_RESTART_FLAGS = ("_restarting", "_loaded_from_state_dict", "_resuming_from_checkpoint", "_restart_stage")
"""Set where `fit` goes on from a checkpoint; the loops look at them until the end of the epoch."""


def _loops(loop: _Loop, path: str = "fit") -> Iterator[tuple[str, _Loop]]:
    yield path, loop
    for name, value in vars(loop).items():
        if isinstance(value, _Loop):
            yield from _loops(value, f"{path}.{name}")


def capture_loops(trainer: pl.Trainer) -> dict[str, Any]:
    """Progress of all loops of `fit`, and the values logged so far in the epoch."""
    state: dict[str, Any] = {}
    for path, loop in _loops(trainer.fit_loop):
        progress = {name: value.state_dict() for name, value in vars(loop).items() if isinstance(value, _BaseProgress)}
        flags = {name: getattr(loop, name) for name in _RESTART_FLAGS if hasattr(loop, name)}
        state[path] = {"progress": progress, "own": loop.on_save_checkpoint() if path != "fit" else {}, "flags": flags}
        results = getattr(loop, "_results", None) if "_results" in vars(loop) else None
        if results is not None:
            state[path]["results"] = dict(results)
            state[path]["results_meta"] = (results.training, results.batch_size, results.dataloader_idx)
    return state


def restore_loops(trainer: pl.Trainer, state: dict[str, Any]) -> None:
    """Put back what `capture_loops` took, in place; what `position_loops` has armed is as it was there."""
    for path, loop in _loops(trainer.fit_loop):
        saved = state[path]
        for name, progress in saved["progress"].items():
            _load_progress(getattr(loop, name), progress)
        if saved["own"]:
            loop.on_load_checkpoint(saved["own"])
        if "results" in saved:
            results = vars(loop)["_results"]
            results.clear()
            results.update(saved["results"])
            results.training, results.batch_size, results.dataloader_idx = saved["results_meta"]
        for flag, value in saved["flags"].items():
            setattr(loop, flag, value)
    trainer.fit_loop.epoch_loop.__dict__.pop("_should_check_val_fx", None)


def _load_progress(progress: Any, state: dict[str, Any]) -> None:
    """As the progress' own `load_state_dict`, which builds new objects for its parts; others hold references to them."""
    for name, value in state.items():
        current = getattr(progress, name)
        if isinstance(current, _BaseProgress):
            _load_progress(current, value)
        else:
            setattr(progress, name, value)


def position_loops(trainer: pl.Trainer, state: dict[str, Any]) -> None:
    """Make the next `fit_loop.run` enter the epoch and batch in which `state` was captured, by Lightning's own way of resuming."""
    destination: dict[str, Any] = {}
    for path, saved in state.items():
        prefix = path.removeprefix("fit").lstrip(".")
        prefix = f"{prefix}." if prefix else ""
        for name, progress in saved["progress"].items():
            destination[prefix + name] = progress
        destination[prefix + "state_dict"] = saved["own"]
    trainer.fit_loop.load_state_dict(destination)
    loop = trainer.fit_loop.epoch_loop
    loop.batch_progress.is_last_batch = False  # else a loop that has validated before takes the epoch for finished
    loop.val_loop._has_run = False
    # Before 2.5 a loop that is resumed after a batch at which validation was due validates first; a replaced rank's peers have done that.
    loop._should_check_val_fx = lambda data_fetcher: False  # type: ignore[method-assign]


_METRICS = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics", "_first_loop_iter", "_current_fx")


def capture_metrics(trainer: pl.Trainer) -> dict[str, Any]:
    """What callbacks, loggers and the progress bar see, whether the next `self.log` begins a new accumulation, and in which hook it is: an
    exception leaves the innermost one's name behind, under which the repeated step would log a second value."""
    metrics = {name: copy.copy(getattr(trainer._logger_connector, name)) for name in _METRICS}
    return metrics | {"_current_fx_name": trainer.lightning_module._current_fx_name}


def restore_metrics(trainer: pl.Trainer, state: dict[str, Any]) -> None:
    """Inverse of `capture_metrics`."""
    for name in _METRICS:
        setattr(trainer._logger_connector, name, copy.copy(state[name]))
    trainer.lightning_module._current_fx_name = state["_current_fx_name"]


def is_clock(callback: pl.Callback) -> bool:
    """Timer's `load_state_dict` adds to a clock that may be running; its attributes say all."""
    return isinstance(callback, Timer)


def reset_scaler(trainer: pl.Trainer) -> None:
    """A step that was cut short may have unscaled its gradients already; a gradient scaler refuses to do so twice."""
    states = getattr(getattr(trainer.precision_plugin, "scaler", None), "_per_optimizer_states", None)
    if states is not None:
        states.clear()


def closure_result(closure: Any) -> tuple[Any, ...] | None:
    """(loss, extra) of an executed closure of the automatic loop; None for a closure the user wrapped in something else."""
    result = getattr(closure, "_result", None) if isinstance(closure, Closure) else None
    return (result.loss, dict(result.extra)) if isinstance(result, ClosureResult) else None


def set_closure_result(closure: Any, saved: tuple[Any, ...] | None) -> bool:
    """Make the closure look as if it had been executed with this result; False where that is not possible."""
    if saved is None or not isinstance(closure, Closure):
        return False
    result = ClosureResult(closure_loss=saved[0], extra=saved[1])
    result.closure_loss = None
    closure._result = result
    return True


def take_sigterm(trainer: pl.Trainer) -> list[Callable[[int, Any], Any]]:
    """Lightning's handler broadcasts inside the signal handler, in the middle of whatever the rank was doing, and each rank would end after
    a step of its own. The agent names the step instead (`end_after_this_step`); the signal itself does nothing to a rank in `fit`.
    Returns the handlers that others have set (NeMo's PreemptionCallback, the script), for `pass_sigterm_on`."""
    if threading.current_thread() is not threading.main_thread():
        return []
    found: Any = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, _nothing)
    handlers = found.signal_handlers if isinstance(found, _HandlersCompose) else [found]
    own = trainer._signal_connector
    return [each for each in handlers if callable(each) and each is not _nothing and getattr(each, "__self__", None) is not own]


def pass_sigterm_on(handlers: list[Callable[[int, Any], Any]]) -> None:
    """As if SIGTERM had arrived in this rank between two lines of its script."""
    for handler in handlers:
        handler(signal.SIGTERM, None)
    if handlers:  # then this is the main thread; NeMo's puts the earlier one back, which is Lightning's
        signal.signal(signal.SIGTERM, _nothing)


def _nothing(number: int, frame: Any) -> None:
    """A function, because SIG_IGN would be inherited by what the script starts."""


def end_after_this_step(trainer: pl.Trainer) -> None:
    """As if SIGTERM had arrived: Lightning leaves its loops at the end of this step, with `on_exception` hooks."""
    trainer._signal_connector.received_sigterm = True


def read_ahead(trainer: pl.Trainer) -> int:
    """Batches that Lightning has taken from the training loader and not yet given to the loop; -1 where a step fetches its own, after the
    boundary (`dataloader_iter`)."""
    fetcher = trainer.fit_loop._data_fetcher
    return -1 if isinstance(fetcher, _DataLoaderIterDataFetcher) else len(getattr(fetcher, "batches", ()))


_FETCHER = ("fetched", "done", "_batch_idx", "_dataloader_idx")


def capture_fetcher(trainer: pl.Trainer) -> dict[str, Any]:
    """Where a fetcher is that counts what steps fetch themselves: a step may fetch several micro-batches, so loops do not tell."""
    fetcher = trainer.fit_loop._data_fetcher
    return {name: getattr(fetcher, name) for name in _FETCHER if hasattr(fetcher, name)}


def restore_fetcher(trainer: pl.Trainer, state: dict[str, Any]) -> None:
    """Inverse of `capture_fetcher`."""
    for name, value in state.items():
        setattr(trainer.fit_loop._data_fetcher, name, value)


def interrupted_at(trainer: pl.Trainer) -> int:
    """Batches of the present epoch that were used before the checkpoint that `fit` goes on from; 0 without one, or at an epoch's end."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return 0 if progress.is_last_batch or not trainer.fit_loop.restarting else progress.current.ready


def finish_saved_batch(trainer: pl.Trainer) -> None:
    """Before the loops run, on going on from a checkpoint: the batch after which it was saved (in `on_train_batch_end`, where a callback
    saves every n steps) is done, and the epoch with it where it was the last. Lightning does so since 2.5; before, it gives the next batch
    the number of the one before, and an epoch that is over is entered again."""
    fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    progress = loop.batch_progress
    now: Any = progress.current  # declared as a tracker that counts less
    used = now.ready == now.processed == now.completed + 1
    if hasattr(fit, "_restart_stage") or not fit.restarting or not used:
        return
    if not loop._should_accumulate():
        loop._batches_that_stepped += 1
    progress.increment_completed()
    if progress.is_last_batch:
        fit.epoch_progress.increment_processed()
        fit.epoch_progress.increment_completed()
        for _, each in _loops(fit):
            each._restarting = False


def forget_loaders(trainer: pl.Trainer) -> None:
    """Undo what the first entry of `fit` set up, before a second entry in the same process."""
    loop = trainer.fit_loop
    if loop._data_fetcher is not None:
        loop._data_fetcher.teardown()
    loop._data_fetcher = None
    loop._combined_loader = None
    trainer._signal_connector.teardown()
    model = trainer.lightning_module
    for module in model.modules() if model is not None else ():
        if "forward" in vars(module):  # left behind by _ForwardRedirection when the wrapped forward raised
            del module.forward


def drop_redirection(model: nn.Module) -> None:
    """Remove a patched `forward` that an exception inside DDP's forward left on the module."""
    vars(model).pop("forward", None)


def unwrap_optimizers(trainer: pl.Trainer) -> list[torch.optim.Optimizer]:
    """The raw optimizers; a strategy that wraps them itself (`inner_optimizers`) says which they are."""
    raw = [getattr(optimizer, "optimizer", optimizer) for optimizer in trainer.strategy.optimizers]
    inner = getattr(trainer.strategy, "inner_optimizers", None)
    return raw if inner is None else inner(raw)


def dump_checkpoint(trainer: pl.Trainer, state_dict: dict[str, Any], optimizer_states: list[dict[str, Any]]) -> dict[str, Any]:
    """The checkpoint that Lightning would save now, hooks of callbacks and modules included, around tensors that are given: its strategies
    would gather and copy them."""
    strategy, states = vars(trainer.strategy), iter(optimizer_states)
    strategy["lightning_module_state_dict"] = lambda: state_dict
    strategy["optimizer_state"] = lambda optimizer: next(states)
    try:
        return dict(trainer._checkpoint_connector.dump_checkpoint(weights_only=False))
    finally:
        del strategy["lightning_module_state_dict"], strategy["optimizer_state"]
