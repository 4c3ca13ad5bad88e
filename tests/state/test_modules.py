"""Buffers that come and grow, and attributes that change: as NeMo's masks do."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_gemini.state import codec
from lightning_gemini.state.modules import ModuleState


class Mask(nn.Module):
    """As long as the longest input so far; made when it is first needed."""

    def __init__(self) -> None:
        super().__init__()
        self.longest = 0
        self.note: str | None = None
        self.register_buffer("empty", None)
        self.register_buffer("mean", torch.zeros(2))
        self.total = torch.zeros(1)

    def see(self, length: int) -> None:
        if length > self.longest:
            self.longest = length
            if hasattr(self, "range"):
                self.range = torch.arange(length)
            else:
                self.register_buffer("range", torch.arange(length), persistent=False)
            self.cached = self.range
        self.mean += 1  # type: ignore[has-type]
        self.total += length


def model() -> nn.Sequential:
    return nn.Sequential(Mask(), nn.Linear(2, 2))


def look(mask: Any) -> Any:
    names = sorted(name for name in vars(mask) if name[0] != "_" and name != "training")
    attributes = {name: value.tolist() if isinstance(value, torch.Tensor) else value for name in names for value in [getattr(mask, name)]}
    buffers = {name: None if value is None else value.tolist() for name, value in mask._buffers.items()}
    return attributes, buffers, set(mask._non_persistent_buffers_set)


def passed(state: dict[str, Any]) -> dict[str, Any]:
    """To another process."""
    found: dict[str, Any] = codec.decode(memoryview(codec.encode(state, {}, foreign=True)), {}, foreign=True, device=torch.device("cpu"))
    return found


def test_another_process_has_the_same_afterwards() -> None:
    mine, theirs = model(), model()
    here, there = ModuleState(mine), ModuleState(theirs)
    for length in (3, 7):
        mine[0].see(length)
        state = passed(here.capture())
        theirs[0].see(5)  # something else
        there.restore(state)
        assert look(theirs[0]) == look(mine[0])
        assert theirs[0].cached.data_ptr() != mine[0].cached.data_ptr()


def test_what_an_attempt_has_added_is_taken_away() -> None:
    net = model()
    state = ModuleState(net)
    before, boundary = look(net[0]), passed(state.capture())
    net[0].see(4)
    net[0].empty = torch.ones(1)
    net[0].note = "seen"
    state.restore(boundary)
    after = look(net[0])
    assert after[0] | {"total": None} == before[0] | {"total": None} and after[1:] == before[1:]


def test_a_buffer_of_the_same_shape_stays_where_it_is() -> None:
    net = model()
    state, mean = ModuleState(net), net[0].mean
    boundary = passed(state.capture())
    net[0].mean += 5
    state.restore(boundary)
    assert net[0].mean is mean and mean.tolist() == [0, 0]


def test_only_what_has_changed_is_kept() -> None:
    net = model()
    state = ModuleState(net)
    assert state.capture()["attributes"] == {}
    net[0].see(2)
    assert set(state.capture()["attributes"]["0"]) == {"longest", "cached", "total"}
    again = ModuleState(net, state)  # fit is entered a second time: the same counts as changed
    assert set(again.capture()["attributes"]["0"]) == {"longest", "cached", "total"}
