"""The tensors of a rank under Megatron, by name, and who holds the same bytes of each.

Seam: `Tensors(parallel, rank)`; `entries` lists the live ones, `label` tells what a name would be labelled that does not exist yet (the
state of an optimizer that has not stepped). Names are those of `state.catalogue`, and `main/optimizer/index` for the fp32 copies of half
precision parameters, which live in the optimizer only.

A name is a rank's own: on another pipeline stage, or at another place of a distributed optimizer, it means another tensor. The label keeps
them apart, because holders of one name are disjoint sets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_gemini.nemo.parallel import Parallel
from lightning_gemini.state.catalogue import Entry, parameters_of


def inner_optimizers(optimizers: Iterable[Any]) -> list[Optimizer]:
    """The torch optimizers in NeMo's wrapper of Megatron's: one for dense parameters, one for experts; fewer where a rank trains none."""
    return [inner for _, inner in _wrapped(optimizers)]


def megatron_optimizers(optimizers: Iterable[Any]) -> list[Any]:
    """Megatron's own, one level above `inner_optimizers`."""
    return [outer for outer, _ in _wrapped(optimizers)]


def _wrapped(optimizers: Iterable[Any]) -> Iterator[tuple[Any, Optimizer]]:
    for optimizer in optimizers:
        outer = getattr(optimizer, "mcore_optimizer", None)
        for one in getattr(outer, "chained_optimizers", [outer]):
            if one is None:  # a plain optimizer of the user's
                yield optimizer, optimizer
            elif one.optimizer is not None:
                yield one, one.optimizer


class Tensors:
    """See the module's docstring."""

    def __init__(self, parallel: Parallel, rank: int, *, distributed: bool) -> None:
        """`distributed`: the optimizer's state is sharded over the data parallel ranks."""
        self._parallel, self._rank, self._distributed = parallel, rank, distributed

    def entries(self, model: nn.Module, optimizers: list[Optimizer]) -> list[Entry]:
        """All tensors of the state on this rank."""
        parameters = dict(model.named_parameters())
        trained = self._trained(optimizers)
        found = [self._entry(f"param/{name}", p, self._of(p), p.requires_grad or id(p) in trained) for name, p in parameters.items()]
        storages = {p.untyped_storage().data_ptr() for p in parameters.values()}
        for number, optimizer in enumerate(optimizers):
            for index, parameter in enumerate(parameters_of(optimizer)):
                kind = self._kind(optimizer, index)
                if parameter.untyped_storage().data_ptr() not in storages:
                    found.append(self._entry(f"main/{number}/{index}", parameter, kind))
                for key, value in sorted(optimizer.state.get(parameter, {}).items()):
                    if isinstance(value, torch.Tensor):
                        found.append(self._entry(f"optim/{number}/{index}/{key}", value, kind))
        return found

    def label(self, name: str, optimizers: list[Optimizer]) -> str | None:
        """The label of optimizer state `name` on this rank; None where it has no such parameter."""
        what, number, index, *_ = name.split("/", 3)
        if what != "optim" or int(number) >= len(optimizers) or int(index) >= len(parameters_of(optimizers[int(number)])):
            return None
        return self._label(self._kind(optimizers[int(number)], int(index)))

    def _entry(self, name: str, tensor: torch.Tensor, holders: tuple[int, ...], trained: bool = True) -> Entry:
        return Entry(name, tensor.detach(), holders, self._label(holders), tuple(tensor.shape), (0,) * tensor.dim(), trained)

    def _label(self, holders: tuple[int, ...]) -> str:
        return "" if len(holders) == self._parallel.world else str(holders[0])

    def _of(self, parameter: torch.Tensor) -> tuple[int, ...]:
        expert = not getattr(parameter, "allreduce", True)
        return self._parallel.holders(self._rank, expert=expert, tp_replicated=not getattr(parameter, "tensor_model_parallel", True))

    def _kind(self, optimizer: Optimizer, index: int) -> tuple[int, ...]:
        """Holders of the state of the parameter at `index`."""
        for group in optimizer.param_groups:
            if index < len(group["params"]):
                return self._parallel.holders(
                    self._rank,
                    expert=bool(group.get("is_expert_parallel", False)),
                    tp_replicated=not getattr(group["params"][index], "tensor_model_parallel", True),
                    sharded=self._distributed,
                )
            index -= len(group["params"])
        raise IndexError(index)

    @staticmethod
    def _trained(optimizers: list[Optimizer]) -> set[int]:
        return {id(parameter) for optimizer in optimizers for parameter in parameters_of(optimizer)}
