"""A rank goes on from a checkpoint whose ranks were others than now: another world size, another layout, another strategy.

Seam: `load(trainer, path)` does what a strategy's `load_checkpoint` must, so Lightning restores loops, callbacks and schedulers from
what it returns. A sharded model and its optimizers are filled in place, each rank reading the parts of boxes that it holds (DCP's own
planner cuts them anew). Any other model gets a plain Lightning checkpoint, which is the same for every rank.

Optimizer state is created from what the checkpoint has, not by a step on zero gradients (torch's way): hooks of the optimizer do not
run. No collective is used: every rank reads by itself, and none waits for another that has died.

What cannot be exact with another number of ranks: which samples a rank has seen (Lightning goes on at the same number of batches),
random generators, and whatever rank-local state there is. With the same ranks use `reader`, which is exact.

Failure: `ValueError` that names what the checkpoint lacks; the model may then be half filled, so `fit` must end.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_gemini.compat import dcp
from lightning_gemini.compat import lightning as compat
from lightning_gemini.storage.files import Folder
from lightning_gemini.storage.layout import META
from lightning_gemini.storage.meta import clean, is_sharded, names_of

_Path = tuple[str | int, ...]
_Make = Callable[[_Path, torch.Size, torch.dtype], torch.Tensor]


def load(trainer: pl.Trainer, path: str, *, weights_only: bool | None = None) -> dict[str, Any]:
    """Load the checkpoint at `path` into the model and the optimizers, or return them with the rest.

    Args:
        weights_only: as `torch.load` has it, for `meta.pt`.
    """
    checkpoint = _Checkpoint(path)
    extra: dict[str, Any] = torch.load(io.BytesIO(Folder(path).read(META)), map_location="cpu", weights_only=weights_only)
    module = trainer.lightning_module
    if not is_sharded(module):
        return {**extra, "state_dict": checkpoint.tree("state_dict") or {}, "optimizer_states": checkpoint.tree("optimizer_states") or []}
    _load_module(checkpoint, module)
    for number, optimizer in enumerate(compat.unwrap_optimizers(trainer)):
        _load_optimizer(checkpoint, f"optimizer_{number}", optimizer, names_of(module))
    return extra


class _Checkpoint:
    """DCP's index of a checkpoint, read once."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._reader: StorageReader = dcp.reader(path)
        self._metadata: Metadata = self._reader.read_metadata()

    def has(self, name: str) -> bool:
        """Whether there is a leaf of this name."""
        return name in self._metadata.state_dict_metadata

    def read(self, flat: dict[str, Any]) -> dict[str, Any]:
        """Fill the tensors in `flat` (of a DTensor, this rank's part) and replace its other values."""
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(flat, self._metadata, True)
        self._reader.set_up_storage_reader(self._metadata, True)
        plan = self._reader.prepare_local_plan(planner.create_local_plan())
        with torch.no_grad():
            self._reader.read_data(planner.finish_plan(plan), planner).wait()
        return flat

    def tree(self, top: str, make: _Make = lambda path, size, dtype: torch.empty(size, dtype=dtype)) -> Any:
        """What was saved under a top-level name, None without it; `make` creates the tensors to fill."""
        paths: dict[str, _Path] = {name: path for name, path in self._metadata.planner_data.items() if path[0] == top}
        flat: dict[str, Any] = {}
        for name, path in paths.items():
            found = self._metadata.state_dict_metadata[name]
            flat[name] = make(path, found.size, found.properties.dtype) if isinstance(found, TensorStorageMetadata) else None
        self.read(flat)
        root: dict[str | int, Any] = {}
        for name, path in sorted(paths.items(), key=lambda item: len(item[1])):
            at = root
            for part in path[:-1]:
                at = at.setdefault(part, {})
            at[path[-1]] = flat[name]
        return _with_lists(root.get(top))


def _with_lists(tree: Any) -> Any:
    """Dicts whose keys are numbers are the lists that they were."""
    if not isinstance(tree, dict):
        return tree
    found = {key: _with_lists(value) for key, value in tree.items()}
    return [found[index] for index in sorted(found)] if found and all(type(key) is int for key in found) else found


def _load_module(checkpoint: _Checkpoint, module: pl.LightningModule) -> None:
    live = module.state_dict()
    keys = {name: f"state_dict.{clean(name)}" for name in live}
    missing = [name for name, key in keys.items() if not checkpoint.has(key)]
    if missing and module.strict_loading:
        raise ValueError(f"{checkpoint.path} has no {missing[0]!r} ({len(missing)} names are missing): it is of another model")
    flat = checkpoint.read({key: live[name] for name, key in keys.items() if name not in missing})
    module.load_state_dict({name: flat[key] for name, key in keys.items() if key in flat}, strict=not missing)


def _load_optimizer(checkpoint: _Checkpoint, top: str, optimizer: Optimizer, names: dict[int, str]) -> None:
    owners = {names[id(parameter)]: (parameter, group) for group in optimizer.param_groups for parameter in group["params"]}

    def make(path: _Path, size: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        parameter, group = owners.get(str(path[2]), (None, {}))
        if isinstance(parameter, DTensor) and parameter.shape == size:
            return torch.zeros_like(parameter, dtype=dtype)
        on_device = parameter is not None and (len(size) or group.get("fused") or group.get("capturable"))
        return torch.empty(size, dtype=dtype, device=parameter.device if parameter is not None and on_device else "cpu")

    saved = checkpoint.tree(top, make)
    ours = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    if saved is None or [group.pop("params") for group in saved["param_groups"]] != ours:
        raise ValueError(f"{checkpoint.path}: {top} is not there, or has other parameters: it is of another model or optimizer")
    for group, values in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update(values)
    for name, values in saved.get("state", {}).items():
        optimizer.state[owners[name][0]].update(values)
