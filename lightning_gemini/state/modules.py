"""What modules keep beside their parameters: buffers, and numbers, strings and tensors that are plain attributes of theirs.

Buffers may come and grow while the model is trained: a mask is made for the longest input so far. Its length is an attribute, and DDP
broadcasts the buffers as they are, so a replaced rank needs both exactly as its peers have them. Of attributes only those belong to a
boundary that have changed since set-up; those of the LightningModule itself and of metrics are `local`'s.

Seam: `ModuleState(model)` at set-up; `capture()` at a boundary, `restore(state)` puts it back in place, and takes away what has come since.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchmetrics import Metric

from lightning_gemini.compat.torch import buffers_of, is_persistent

_SCALARS = (int, float, bool, str, type(None))
_MISSING = object()


class ModuleState:
    """See the module's docstring. `previous` is that of an earlier entry of `fit` in this process: the modules have changed since then."""

    def __init__(self, model: nn.Module, previous: ModuleState | None = None) -> None:
        self._model = model
        modules = dict(model.named_modules())
        self._initial: dict[str, dict[str, Any]] = (
            previous._initial if previous else {path: _attributes(path, module) for path, module in modules.items()}
        )
        self._versions: dict[int, int] = (
            previous._versions
            if previous
            else {id(value): _version(value) for found in self._initial.values() for value in found.values() if _is_tensor(value)}
        )
        self._slots: dict[str, set[str]] = previous._slots if previous else {path: set(buffers_of(m)) for path, m in modules.items()}
        """Names of buffers at set-up, those that were None included."""

    def capture(self) -> dict[str, Any]:
        """Live tensors, not copies; references that modules share are one object."""
        modules = list(self._model.named_modules())
        return {
            "buffers": {path: buffers for path, module in modules if (buffers := _buffers(module))},
            "attributes": {path: changed for path, module in modules if (changed := self._changed(path, module))},
            "came": [path for path, _ in modules if path not in self._initial],
        }

    def _changed(self, path: str, module: nn.Module) -> dict[str, Any]:
        initial = self._initial.get(path, {})
        return {
            name: value
            for name, value in _attributes(path, module).items()
            if not _same(value, initial.get(name, _MISSING)) or (_is_tensor(value) and self._versions[id(value)] != _version(value))
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what `capture` took."""
        with torch.no_grad():
            for path, module in self._model.named_modules():
                if path not in self._initial and path not in state["came"]:
                    continue  # made since, as NeMo makes its loss in the first step: nothing to go back to
                self._restore_buffers(path, module, state["buffers"].get(path, {}))
                self._restore_attributes(path, module, state["attributes"].get(path, {}))

    def _restore_buffers(self, path: str, module: nn.Module, saved: dict[str, tuple[torch.Tensor, bool]]) -> None:
        own = buffers_of(module)
        for name, (value, persistent) in saved.items():
            mine = own.get(name)
            if mine is not None and (mine.shape, mine.dtype) == (value.shape, value.dtype):
                mine.copy_(value)
            elif name in own:
                own[name] = value
            else:
                module.register_buffer(name, value, persistent=persistent)
        for name in [name for name, mine in own.items() if mine is not None and name not in saved]:
            if name in self._slots.get(path, ()):
                own[name] = None
            else:
                delattr(module, name)

    def _restore_attributes(self, path: str, module: nn.Module, saved: dict[str, Any]) -> None:
        wanted = self._initial.get(path, {}) | saved
        for name, mine in _attributes(path, module).items():
            if name not in wanted:
                delattr(module, name)
            elif not _same(mine, wanted[name]):
                setattr(module, name, wanted[name])
        for name in saved.keys() - vars(module).keys():
            setattr(module, name, saved[name])


def _attributes(path: str, module: nn.Module) -> dict[str, Any]:
    if not path or isinstance(module, Metric):
        return {}
    own = vars(module).items()
    return {name: value for name, value in own if name[0] != "_" and name != "training" and (type(value) in _SCALARS or _is_tensor(value))}


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.requires_grad


def _version(tensor: torch.Tensor) -> int:
    """Grows whenever the tensor is written to; those of inference mode do not count."""
    return -1 if tensor.is_inference() else tensor._version


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and type(a) in _SCALARS and bool(a == b))


def _buffers(module: nn.Module) -> dict[str, tuple[torch.Tensor, bool]]:
    return {name: (value, is_persistent(module, name)) for name, value in buffers_of(module).items() if value is not None}
