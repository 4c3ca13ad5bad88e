"""Random number generators: python, numpy, torch, the device, and every `random.Random` a module holds.

Taken at the step boundary, not when something fails: a rival that saved them at abort time replays other dropout masks.
"""

from __future__ import annotations

import array
import random
from typing import Any

import numpy as np
import torch
from torch import nn


def capture(device: torch.device) -> dict[str, Any]:
    """The state of the process's global generators (about 10 KB), as bytes: three of these are pickled at every boundary."""
    version, words, gauss = random.getstate()
    numpy: Any = np.random.get_state()
    state: dict[str, Any] = {
        "python": (version, array.array("I", words).tobytes(), gauss),
        "numpy": (numpy[0], numpy[1].tobytes(), *numpy[2:]),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }
    if device.type == "cuda":  # pragma: no cover - needs a GPU
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore(state: dict[str, Any], device: torch.device) -> None:
    """Inverse of `capture`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(array.array("I", words)), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.frombuffer(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.frombuffer(bytearray(state["torch"]), dtype=torch.uint8))
    if "cuda" in state:  # pragma: no cover - needs a GPU
        torch.cuda.set_rng_state(state["cuda"], device)


def private_generators(model: nn.Module) -> dict[str, Any]:
    """Generators that modules hold themselves (NeMo's augmenters do), by path."""
    return {f"{path}:{name}": value for path, module in model.named_modules() for name, value in held_by(module).items()}


def held_by(holder: Any) -> dict[str, Any]:
    """Generators that are attributes of an object."""
    kinds = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
    return {
        name: value
        for name, value in getattr(holder, "__dict__", {}).items()
        if isinstance(value, kinds) and not isinstance(value, random.SystemRandom)  # which has no state
    }


def capture_private(generators: dict[str, Any]) -> dict[str, Any]:
    """Their states."""
    return {path: _get(generator) for path, generator in generators.items()}


def restore_private(generators: dict[str, Any], states: dict[str, Any]) -> None:
    """Inverse of `capture_private`; generators that did not exist then keep what they have."""
    for path, state in states.items():
        generator = generators.get(path)
        if isinstance(generator, random.Random):
            generator.setstate(state)
        elif isinstance(generator, np.random.Generator):
            generator.bit_generator.state = state
        elif isinstance(generator, np.random.RandomState):
            generator.set_state(state)
        elif isinstance(generator, torch.Generator):
            generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


def _get(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, torch.Generator):
        return generator.get_state().numpy().tobytes()
    return generator.bit_generator.state if isinstance(generator, np.random.Generator) else generator.get_state()
