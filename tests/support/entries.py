"""Entries of a catalogue, made by hand."""

from __future__ import annotations

import torch

from lightning_gemini.state.catalogue import Entry


def entry(name: str, tensor: torch.Tensor, holders: tuple[int, ...], world: int = 0) -> Entry:
    """A tensor that these ranks hold whole; `world` tells that they are not all."""
    shard = "" if not world or len(holders) == world else str(holders[0])
    return Entry(name, tensor, holders, shard, tuple(tensor.shape), (0,) * tensor.dim())
