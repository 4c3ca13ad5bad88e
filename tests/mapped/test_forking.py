"""A fork that hangs before its first line, as CPython's may: it is killed, and another one is made."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_gemini.config import DataConfig
from lightning_gemini.mapped import forking
from lightning_gemini.mapped.forking import Owner
from lightning_gemini.mapped.loader import MappedLoader, Stream

_hanging = 0
"""How many of the next forks hang."""
_forks: list[int] = []


def _before() -> None:
    if _hanging:
        _forks.append(len(_forks))


def _in_child() -> None:
    if _hanging and len(_forks) <= _hanging:
        signal.pause()


os.register_at_fork(before=_before, after_in_child=_in_child)


@pytest.fixture
def hang() -> Iterator[None]:
    """Forget what was asked for."""
    _forks.clear()
    yield
    globals().update(_hanging=0)


def batches(name: str) -> list[torch.Tensor]:
    stream = Stream(f"{name}-{os.getpid()}", 0, 1, lambda: 0, lambda: False)
    loader = MappedLoader(DataLoader(TensorDataset(torch.arange(6)), batch_size=2), DataConfig(), stream, Owner(os.getpid()))
    try:
        return [batch[0].clone() for batch in loader]
    finally:
        loader.close()


def test_another_one_is_made(hang: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forking, "_FORK_S", 0.2)
    globals().update(_hanging=2)
    assert torch.cat(batches("two")).tolist() == [0, 1, 2, 3, 4, 5]
    assert len(_forks) == 3


def test_but_not_for_ever(hang: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forking, "_FORK_S", 0.1)
    globals().update(_hanging=100)
    with pytest.raises(OSError, match="no loader process could be started"):
        batches("all")
    assert len(_forks) == 3
