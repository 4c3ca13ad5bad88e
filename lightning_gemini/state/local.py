"""The rank-local state: everything of a step boundary that is not a tensor of the model or its optimizers.

RNG of the boundary, progress of the loops, values logged in the epoch, metrics, callbacks, schedulers, scaler, position of the loader,
torchmetrics, plain attributes of the LightningModule, and of callbacks those that have changed since set-up (a process id has not).
Stored in the rank's own shared memory. `foreign` says that a process on another machine may read it: then nothing is stored that only
pickle can store, and no pickle is read (see `codec`). Objects that belong to the process (trainer, model, metrics …) go by name and are
resolved to the reader's own.

Failure: what cannot be stored -> `ValueError` with its path, in `capture`; bytes that were not captured here -> `ValueError` in `decode`
and `logger_versions`.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import logging
import struct
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torchmetrics import Metric

from lightning_gemini.compat import lightning as compat
from lightning_gemini.compat import loggers, results
from lightning_gemini.data.position import PositionedLoader
from lightning_gemini.state import codec, rng
from lightning_gemini.state.catalogue import parameters_of
from lightning_gemini.state.modules import ModuleState

log = logging.getLogger(__name__)
_SIZE = struct.Struct("<Q")
"""Of what set-up reads alone, before the rest."""
_PLAIN = (int, float, bool, str, bytes, complex, type(None))


class Kind(enum.IntEnum):
    """Where in the loop a boundary was captured; it decides where a replaced rank lands."""

    START = 1
    """Before the first step, in `on_train_start`."""
    ENTRY = 2
    """On entering a step: the closure comes next."""
    EXIT = 3
    """On leaving a step: the optimizer has written."""


@dataclass(slots=True)
class Boundary:
    """A decoded local state."""

    kind: Kind
    step: int
    counters: dict[str, int]
    """Collectives completed outside steps, by group."""
    wrapper: dict[str, Any]
    """State of the model's wrapper that decides how it adds and when it synchronizes (DDP's bucket order and flags)."""
    result: Any
    """EXIT: what the step returned."""
    grads: list[torch.Tensor | None] | None
    """Gradients gathered so far that no optimizer has used; None without any."""
    state: dict[str, Any]
    frozen: bytes = b""
    """`Frozen.record`: which parameters are no state of this step, and their checksums."""


class LocalState:
    """Captures and restores the rank-local state of one `fit`."""

    def __init__(self, trainer: pl.Trainer, previous: LocalState | None = None, *, foreign: bool = False) -> None:
        """`previous` is that of an earlier entry of `fit` in this process: the callbacks have changed since then. `foreign`: see above."""
        self.trainer = trainer
        self._foreign = foreign
        self.model = trainer.lightning_module
        self._anchors: dict[str, Any] = {"trainer": trainer, "strategy": trainer.strategy, "datamodule": trainer.datamodule}  # type: ignore[attr-defined]
        self._anchors |= {f"module:{name}": module for name, module in self.model.named_modules(remove_duplicate=False)}
        self._anchors |= {f"callback:{i}": callback for i, callback in enumerate(trainer.callbacks)}  # type: ignore[attr-defined]
        self._anchors |= {f"logger:{i}": logger for i, logger in enumerate(trainer.loggers)}
        self._names = {id(value): name for name, value in reversed(self._anchors.items()) if value is not None}
        self._rows = loggers.Rows(trainer)
        self._generators = rng.private_generators(self.model)
        self._modules: ModuleState = ModuleState(self.model, previous._modules if previous else None)
        self._made = self._members()
        self._initial: list[dict[str, Any]] = previous._initial if previous else copy.deepcopy([_at_set_up(c) for c in trainer.callbacks])  # type: ignore[attr-defined]

    # ---- capture

    def capture(self, boundary: Boundary) -> bytes:
        """Serialise the present state as `boundary`, whose `state` is filled in."""
        trainer = self.trainer
        optimizers = compat.unwrap_optimizers(trainer)
        boundary.state = {
            "modules": self._modules.capture(),
            "rng": rng.capture(trainer.strategy.root_device),
            "generators": rng.capture_private(self._generators),
            "loops": compat.capture_loops(trainer),
            "metrics": compat.capture_metrics(trainer),
            "callback_names": [_name(callback) for callback in trainer.callbacks],  # type: ignore[attr-defined]
            "callbacks": [callback.state_dict() for callback in trainer.callbacks],  # type: ignore[attr-defined]
            "callback_attributes": [
                _since(initial, _attributes(callback))
                for callback, initial in zip(trainer.callbacks, self._initial, strict=True)  # type: ignore[attr-defined]
            ],
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "groups": [[_without_params(group) for group in optimizer.param_groups] for optimizer in optimizers],
            "members": self._renamed(self._members()),
            "scalars": [_scalars(optimizer) for optimizer in optimizers],
            "precision": trainer.precision_plugin.state_dict(),
            "torchmetrics": {name: _metric_state(module) for name, module in self.model.named_modules() if isinstance(module, Metric)},
            "attributes": {
                name: value
                for name, value in vars(self.model).items()
                if not name.startswith("_") and (is_plain(value) or _is_value(value))
            },
            "evaluating": [name for name, module in self.model.named_modules() if not module.training],
            "should_stop": trainer.should_stop,
            "loaders": [loader.position(compat.read_ahead(trainer)) for loader in _loaders(trainer)],
            "rows": self._rows.capture(),
            "strategy": getattr(trainer.strategy, "rank_state", dict)(),
        }
        head = codec.encode({"logger_versions": loggers.versions(trainer)}, {}, foreign=self._foreign)
        return b"".join([_SIZE.pack(len(head)), head, codec.encode(self._plain(boundary), self._names, foreign=self._foreign)])

    def _plain(self, boundary: Boundary) -> dict[str, Any]:
        """With values of `self.log` as rows, and `boundary` itself as a dict."""
        loops = {path: dict(loop) for path, loop in boundary.state["loops"].items()}
        for loop in loops.values():
            if "results" in loop:
                loop["results"] = results.pack(loop["results"], self.trainer.strategy)
        fields = {field.name: getattr(boundary, field.name) for field in dataclasses.fields(boundary)}
        return {**fields, "kind": int(boundary.kind), "state": {**boundary.state, "loops": loops}}

    def decode(self, data: bytes) -> Boundary:
        """Inverse of the serialisation; nothing is restored yet. Raises `ValueError` for other bytes."""
        strategy, start = self.trainer.strategy, _SIZE.size + _head_size(data)
        plain = codec.decode(memoryview(data)[start:], self._anchors, foreign=self._foreign, device=strategy.root_device)
        try:
            for loop in plain["state"]["loops"].values():
                if "results" in loop:
                    loop["results"] = results.unpack(loop["results"], strategy)
            return Boundary(**{**plain, "kind": Kind(plain["kind"])})
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"the rank-local state has another shape than this version's: {error}") from error

    @staticmethod
    def logger_versions(data: bytes, *, foreign: bool = False) -> list[Any]:
        """What set-up needs to know before anything else can be decoded."""
        head = memoryview(data)[_SIZE.size : _SIZE.size + _head_size(data)]
        return codec.decode(head, {}, foreign=foreign)["logger_versions"]  # type: ignore[no-any-return]

    def _members(self) -> list[list[list[int]]]:
        """Ids of the parameters in each optimizer's groups."""
        optimizers = compat.unwrap_optimizers(self.trainer)
        return [[[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups] for optimizer in optimizers]

    def _renamed(self, members: list[list[list[int]]]) -> list[list[list[str]]] | None:
        """Names in place of ids; None where the groups are as the script has made them."""
        if members == self._made:
            return None
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        if any(member not in names for groups in members for group in groups for member in group):
            raise ValueError("an optimizer was given a parameter in training that is none of the model's now: it could not be restored")
        return [[[names[member] for member in group] for group in groups] for groups in members]

    # ---- restore

    def regroup(self, boundary: Boundary) -> None:
        """Before tensors are restored: optimizers get the groups that somebody has added in training (`add_param_group`)."""
        parameters = dict(self.model.named_parameters())
        optimizers = compat.unwrap_optimizers(self.trainer)
        for optimizer, groups, saved in zip(optimizers, boundary.state["members"] or [], boundary.state["groups"], strict=False):
            members = [{"params": [parameters[name] for name in group]} for group in groups]
            optimizer.param_groups[:] = [{**values, **member} for values, member in zip(saved, members, strict=True)]

    def position(self, boundary: Boundary) -> None:
        """Before the loops run: make them and the loaders enter at the boundary's epoch and batch."""
        if boundary.kind is not Kind.START:
            compat.position_loops(self.trainer, boundary.state["loops"])
        positions = list(boundary.state["loaders"])
        self.trainer.strategy.loader_positions = positions  # type: ignore[attr-defined]

    def restore(self, boundary: Boundary) -> None:
        """Put everything back, in place; the random generators last."""
        trainer, state = self.trainer, boundary.state
        compat.restore_loops(trainer, state["loops"])
        compat.restore_metrics(trainer, state["metrics"])
        rows = zip(trainer.callbacks, copy.deepcopy(self._initial), strict=True)  # type: ignore[attr-defined]
        for (callback, initial), place in zip(rows, self._places_of_callbacks(state["callback_names"]), strict=True):
            if place is None:
                continue
            saved, (changed, unchanged) = state["callbacks"][place], state["callback_attributes"][place]
            if saved and not compat.is_clock(callback):
                callback.load_state_dict(saved)
            vars(callback).update({name: initial[name] for name in unchanged if name in initial} | changed)
        if len(state["schedulers"]) != len(trainer.lr_scheduler_configs):
            raise ValueError(
                f"the state was saved with {len(state['schedulers'])} learning rate schedulers, this job has "
                f"{len(trainer.lr_scheduler_configs)}: give it as many, or begin anew (persistent.resume=never)"
            )
        for config, saved in zip(trainer.lr_scheduler_configs, state["schedulers"], strict=True):
            config.scheduler.load_state_dict(saved)
        optimizers = compat.unwrap_optimizers(trainer)
        for optimizer, groups, scalars in zip(optimizers, state["groups"], state["scalars"], strict=True):
            for group, saved in zip(optimizer.param_groups, groups, strict=True):
                group.update(saved)
            parameters = parameters_of(optimizer)
            for (index, key), value in scalars.items():
                optimizer.state[parameters[index]][key] = value
        trainer.precision_plugin.load_state_dict(state["precision"])
        compat.reset_scaler(trainer)
        self._modules.restore(state["modules"])
        modules = dict(self.model.named_modules())
        for name, saved in state["torchmetrics"].items():
            _restore_metric(modules[name], saved)
        for name, value in state["attributes"].items():
            setattr(self.model, name, value)
        evaluating = set(state["evaluating"])  # a rank that raised in validation left its modules in eval mode
        for name, module in modules.items():
            module.training = name not in evaluating
        trainer.should_stop = state["should_stop"]
        self._rows.restore(state["rows"])
        for loader, position in zip(_loaders(trainer), state["loaders"], strict=False):
            loader.adopt(position)
        if state["strategy"]:
            trainer.strategy.restore_rank_state(state["strategy"])  # type: ignore[attr-defined]
        rng.restore_private(self._generators, state["generators"])
        rng.restore(state["rng"], trainer.strategy.root_device)

    def _places_of_callbacks(self, saved: list[str]) -> list[int | None]:
        """For each callback, where its state is. They are the same in a recovery; a job that goes on from a checkpoint may have others."""
        mine, places = [_name(callback) for callback in self.trainer.callbacks], dict[str, list[int]]()  # type: ignore[attr-defined]
        for place, name in enumerate(saved):
            places.setdefault(name, []).append(place)
        found = [places[name].pop(0) if places.get(name) else None for name in mine]
        lost, new = sorted(name for name, rest in places.items() if rest), [n for n, p in zip(mine, found, strict=True) if p is None]
        if (lost or new) and self.trainer.is_global_zero:
            log.warning("callbacks have changed since the checkpoint was written: state of %s is not used, %s begin without any", lost, new)
        return found


def _name(callback: pl.Callback) -> str:
    return f"{type(callback).__module__}.{type(callback).__qualname__}"


def _head_size(data: bytes) -> int:
    if len(data) < _SIZE.size:
        raise ValueError(f"the rank-local state has {len(data)} bytes")
    return int(_SIZE.unpack_from(data)[0])


def is_plain(value: Any) -> bool:
    """Numbers, strings, and lists, tuples, sets and dicts of them, and detached tensors in them."""
    if isinstance(value, _PLAIN):
        return True
    if isinstance(value, (list, tuple, set, frozenset)) and type(value) in (list, tuple, set, frozenset):
        return all(is_plain(item) or _is_value(item) for item in value)
    if type(value) is dict:
        return all(is_plain(key) and (is_plain(item) or _is_value(item)) for key, item in value.items())
    return False


def _attributes(callback: pl.Callback) -> dict[str, Any]:
    """Plain attributes: Lightning's own callbacks (ModelCheckpoint, Timer) keep state there that their `state_dict` lacks."""
    if type(callback).__module__.startswith("lightning_gemini"):
        return {}
    return {name: value for name, value in vars(callback).items() if is_plain(value)}


def _at_set_up(callback: pl.Callback) -> dict[str, Any]:
    """Attributes that every process has set up alike. A checkpoint callback may have read its own from the disk (NeMo's does), where a
    spare saw something else; only its folder is its own, also in a later job."""
    found = _attributes(callback)
    return {name: found[name] for name in ("dirpath",) if name in found} if isinstance(callback, pl.callbacks.Checkpoint) else found


def _since(initial: dict[str, Any], now: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What has changed, and the names of what has not. Neither has what is plain no more (a progress bar was None at set-up)."""
    unchanged = [name for name, value in now.items() if name in initial and _equal(value, initial[name])]
    return {name: value for name, value in now.items() if name not in unchanged}, unchanged


def _equal(a: Any, b: Any) -> bool:
    try:
        return type(a) is type(b) and bool(a == b)
    except Exception:  # containers of tensors do not compare
        return False


def _is_value(item: Any) -> bool:
    return isinstance(item, torch.Tensor) and not item.requires_grad


def _loaders(trainer: pl.Trainer) -> list[PositionedLoader]:
    loaders = trainer.train_dataloader
    found: list[PositionedLoader] = []

    def visit(value: Any) -> None:
        if isinstance(value, PositionedLoader):
            found.append(value)
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)

    visit(loaders)
    return found


def _without_params(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _scalars(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], Any]:
    return {
        (index, key): value
        for index, parameter in enumerate(parameters_of(optimizer))
        for key, value in optimizer.state.get(parameter, {}).items()
        if not isinstance(value, torch.Tensor)
    }


def _metric_state(metric: Metric) -> dict[str, Any]:
    return {"state": {key: value for key, value in metric.metric_state.items()}, "updates": metric.update_count}


def _restore_metric(metric: Any, saved: dict[str, Any]) -> None:
    for key, value in saved["state"].items():
        setattr(metric, key, value)
    metric._update_count = saved["updates"]
    metric._computed = None
