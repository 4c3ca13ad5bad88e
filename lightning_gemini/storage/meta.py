"""What a rank says of a step for the persistent tier: the state dict's names, and everything in it that is in no arena.

Seam: `describe(trainer) -> bytes`, legal in `on_train_batch_end` after the step that is persisted; Lightning's own checkpoints are made
there too, and it knows how to go on from them. Call it on all ranks, as Lightning calls its `on_save_checkpoint` hooks; the result of
rank 0 goes to `description.publish`. No tensor of a model or an optimizer is copied: hooks see the live ones.

Names are those of Lightning's sharded checkpoints: `state_dict.<name>`, `optimizer_<i>.state.<name>.<key>`,
`optimizer_<i>.param_groups.<n>.…`. The same optimizers are also named `optimizer_states.<i>.…`, and what is in `meta.pt` is also named,
so that DCP's own tools make a plain Lightning checkpoint of it.

Failure: what a user's hook raises. A leaf that `torch.save` refuses raises its error with the leaf's name.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import msgspec
import torch
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_gemini.compat import lightning as compat
from lightning_gemini.state.catalogue import parameters_of
from lightning_gemini.state.raw import pack
from lightning_gemini.storage.description import Description, Value
from lightning_gemini.storage.layout import Key

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""Parts of names that a sharded checkpoint leaves out: those of torch.compile and of activation checkpointing."""


def describe(trainer: pl.Trainer) -> bytes:
    """The encoded `Description` of the present step; empty on other ranks than 0."""
    module, optimizers = trainer.lightning_module, compat.unwrap_optimizers(trainer)
    states = [_optimizer_state(module, optimizer) for optimizer in optimizers]
    checkpoint = compat.dump_checkpoint(trainer, _module_state(module), states)
    tree: dict[str, Any] = {"state_dict": checkpoint.pop("state_dict", {})}
    states = checkpoint.pop("optimizer_states", [])
    tree |= {f"optimizer_{index}": state for index, state in enumerate(states)}
    tree["optimizer_states"] = states
    leaves = [*_leaves(tree), *(((name,), value) for name, value in checkpoint.items())]
    if any(not state["state"] for state in states):  # a container that is empty has no leaf, but torch's optimizers want it
        leaves += [(("optimizer_states", index, "state"), {}) for index, state in enumerate(states) if not state["state"]]
    described = _Describing(_sources(module, optimizers))
    for path, value in leaves:
        described.add(path, value)
    return described.encode(checkpoint) if trainer.global_rank == 0 else b""


def clean(name: str) -> str:
    """A parameter's name without what wrappers add to it."""
    for part in _WRAPPERS:
        name = name.replace(part, "")
    return name


def is_sharded(module: nn.Module) -> bool:
    """Whether a model has parts of tensors only (FSDP2, tensor parallelism)."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def names_of(module: nn.Module) -> dict[int, str]:
    """id of a parameter -> its name in checkpoints."""
    sharded = is_sharded(module)
    return {id(parameter): clean(name) if sharded else name for name, parameter in module.named_parameters()}


def _module_state(module: nn.Module) -> dict[str, Any]:
    state = module.state_dict(keep_vars=True)  # parameters themselves: they are recognised by identity
    return {clean(name): value for name, value in state.items()} if is_sharded(module) else dict(state)


def _optimizer_state(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Its state dict with names of parameters in place of numbers, as torch's `get_optimizer_state_dict` has it, but without its copies."""
    names, state = names_of(module), optimizer.state_dict()
    by_number = {index: names.get(id(parameter), str(index)) for index, parameter in enumerate(parameters_of(optimizer))}
    groups = [{**group, "params": [by_number[number] for number in group["params"]]} for group in state["param_groups"]]
    return {**state, "state": {by_number[number]: value for number, value in state["state"].items()}, "param_groups": groups}


def _sources(module: nn.Module, optimizers: list[Optimizer]) -> dict[int, str]:
    """id of a tensor in the arenas -> its name there."""
    found = {id(parameter): f"param/{name}" for name, parameter in module.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        for index, parameter in enumerate(parameters_of(optimizer)):
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    found[id(value)] = f"optim/{number}/{index}/{key}"
    return found


def _leaves(tree: Mapping[str, Any]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Path and value of each leaf, cut up as DCP does it."""
    planner = DefaultSavePlanner(flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tree), is_coordinator=True)
    for name, path in planner.mappings.items():
        yield path, planner.state_dict[name]


class _Describing:
    """Collects the leaves of a state dict."""

    def __init__(self, sources: dict[int, str]) -> None:
        self._sources = sources
        self._kept: list[Any] = []
        self._description = Description([], {}, [], b"")

    def add(self, path: tuple[str | int, ...], value: Any) -> None:
        """A leaf; one that was added before under another path is stored once."""
        source = self._sources.get(id(value))
        if source is None:
            source = self._sources[id(value)] = "/".join(map(str, ("value", *path)))
            self._kept.append(value)  # an id is worth something only as long as its object lives
            self._store(source, value)
        self._description.keys.append(Key(path, source))

    def _store(self, source: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            dtype = str(whole.dtype).removeprefix("torch.")
            self._description.tensors.append(Value(source, dtype, tuple(whole.shape), pack([whole.detach()])))
        else:
            self._description.blobs[source] = _pickled(value, source)

    def encode(self, meta: Mapping[str, Any]) -> bytes:
        """The whole, with the contents of `meta.pt`."""
        self._description.meta = _pickled(dict(meta), "meta.pt")
        return msgspec.msgpack.encode(self._description)


def _pickled(value: Any, name: str) -> bytes:
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
    except Exception as error:
        raise ValueError(f"{name} cannot be saved in a checkpoint: {error}") from error
    return buffer.getvalue()
