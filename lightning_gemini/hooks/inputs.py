"""A step that is repeated is given what it was given first, also where it has written into its batch (NeMo adds its dither in place).

Seam: `with inputs.step():` around all attempts of a step, `inputs.give(…)` at the beginning of each, with what `training_step` gets.
Copies are made in the first step, and from then on only where a step has written into its batch before: tensors count their writes.
Failure: the first write of all in a step that is repeated -> a warning that names the step's consequence; it has nothing to go back to.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

log = logging.getLogger(__name__)


class Inputs:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._written: bool | None = None
        """Whether a step has ever written into its batch; None before the first."""
        self._in_step = False
        self._tensors: list[torch.Tensor] = []
        self._copies: list[torch.Tensor] = []
        self._versions: list[int] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """All attempts of one step."""
        self._in_step = True
        try:
            yield
        finally:
            if self._tensors:
                self._written = self._written or self._changed()
            self._in_step, self._tensors, self._copies, self._versions = False, [], [], []

    def give(self, *values: Any) -> None:
        """An attempt begins with these; those of an earlier attempt are made as they were."""
        if not self._in_step:
            return
        if not self._tensors:
            self._tensors = list(_tensors(values))
            self._copies = [] if self._written is False else [tensor.clone() for tensor in self._tensors]
        elif self._changed():
            if not self._copies:
                log.warning("lightning_gemini: training_step has written into its batch for the first time: its repetition sees other data")
            self._written = True
            with torch.no_grad():
                for tensor, copy in zip(self._tensors, self._copies, strict=False):
                    tensor.copy_(copy)
        self._versions = [tensor._version for tensor in self._tensors]

    def _changed(self) -> bool:
        return any(tensor._version != version for tensor, version in zip(self._tensors, self._versions, strict=True))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if not value.is_inference():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
