"""The catalogue of a model: names, holders, live tensors; and where restored bytes go."""

from __future__ import annotations

import pytest
import torch

from lightning_gemini.snapshot.manifest import Segment
from lightning_gemini.state import catalogue as module
from lightning_gemini.state.catalogue import Entry, copy_in, layout, parameters_of, require_same, target_of
from lightning_gemini.state.ownership import Layout, owned


def catalogue(
    model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], *, replicated: bool, rank: int = 0, world: int = 3
) -> list[Entry]:
    """Of rank `rank`."""
    return module.catalogue(model, optimizers, replicated=replicated, rank=rank, world=world)


# ---- the catalogue of a model


def trained(kind: type[torch.optim.Optimizer], **options: float) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model that has done three steps."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 2), torch.nn.BatchNorm2d(3), torch.nn.Flatten(), torch.nn.Linear(12, 2))
    model[3].bias.requires_grad_(False)
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=0.1, **options)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 2, 3, 3)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def test_names_and_order() -> None:
    model, optimizer = trained(torch.optim.SGD, momentum=0.9)
    names = [entry.name for entry in catalogue(model, [optimizer], replicated=True)]
    assert names[:4] == ["param/0.weight", "param/0.bias", "param/1.weight", "param/1.bias"]
    assert names[6:] == [f"optim/0/{i}/momentum_buffer" for i in range(5)]
    assert "param/3.bias" in names, "frozen parameters are state too"
    assert not any("running_mean" in name for name in names), "buffers belong to the rank-local state"


@pytest.mark.parametrize("replicated", [True, False])
def test_who_holds_them(replicated: bool) -> None:
    model, optimizer = trained(torch.optim.Adam)
    expected = (range(3), "") if replicated else ((1,), "r1")
    assert {(entry.holders, entry.shard) for entry in catalogue(model, [optimizer], replicated=replicated, rank=1)} == {expected}


def test_entries_are_the_live_tensors() -> None:
    model, optimizer = trained(torch.optim.Adam)
    for entry in catalogue(model, [optimizer], replicated=True):
        entry.tensor.fill_(7)
    assert all((p == 7).all() for p in model.parameters())
    assert all((v == 7).all() for state in optimizer.state.values() for v in state.values())


def test_the_layout_tells_models_apart() -> None:
    model, _ = trained(torch.optim.SGD)
    other, _ = trained(torch.optim.SGD)
    assert layout(catalogue(model, [], replicated=True)) == layout(catalogue(other, [], replicated=True))
    assert layout(catalogue(model, [], replicated=True)) != layout(catalogue(other.double(), [], replicated=True))


def test_looking_at_an_unused_optimizer_does_not_make_state() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    catalogue(model, [optimizer], replicated=True)
    assert not optimizer.state


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.Adam, {}),
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.SGD, {}),
        (torch.optim.Adagrad, {}),
        (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}),
        (torch.optim.NAdam, {}),
    ],
)
def test_a_new_process_goes_on_with_the_same_bits(kind: type[torch.optim.Optimizer], options: dict[str, float]) -> None:
    """Restoring into a fresh optimizer makes its state; both then take the same step."""
    model, optimizer = trained(kind, **options)
    twin, fresh = trained(kind, **options)
    fresh.state.clear()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    live = {entry.name: entry.tensor for entry in catalogue(twin, [fresh], replicated=True)}
    source = catalogue(model, [optimizer], replicated=True)
    for rank in range(3):
        for segment, tensor in owned(source, Layout(rank, 3, 3, 1)).parts:
            data = tensor.contiguous().reshape(-1).view(torch.uint8)[segment.start : segment.start + segment.length].clone()
            live[segment.name] = target_of(segment, live, [fresh])
            copy_in(live[segment.name], segment.start, data)
    twin.load_state_dict({**twin.state_dict(), **dict(model.named_buffers())})
    for m, o in ((model, optimizer), (twin, fresh)):
        o.zero_grad()
        m(torch.ones(4, 2, 3, 3)).square().sum().backward()
        o.step()
    for p, q in zip(parameters_of(optimizer), parameters_of(fresh), strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[p].keys() == fresh.state[q].keys()
        for key, value in optimizer.state[p].items():
            assert fresh.state[q][key].dtype == value.dtype and torch.equal(fresh.state[q][key], value), key


def test_state_that_is_there_is_not_made_again() -> None:
    model, optimizer = trained(torch.optim.Adam)
    live = {entry.name: entry.tensor for entry in catalogue(model, [optimizer], replicated=True)}
    mine = owned(catalogue(model, [optimizer], replicated=True), Layout(0, 1, 1, 1))
    (segment, tensor), *_ = [pair for pair in mine.parts if "exp_avg_sq" in pair[0].name]
    assert target_of(segment, live, [optimizer]).data_ptr() == tensor.data_ptr()


def test_a_parameter_that_the_model_lacks_is_an_error() -> None:
    with pytest.raises(AssertionError, match="param/gone is in the snapshot but not in the model"):
        target_of(Segment("param/gone", (1,), "float32", "", 0, 4), {}, [])


def test_a_parameter_of_another_shape_is_an_error() -> None:
    model = torch.nn.Linear(2, 3)
    entries = {entry.name: entry for entry in catalogue(model, [], replicated=True)}
    with pytest.raises(ValueError, match=r"param/weight as float32 \[4, 3\], this process has built it as float32 \[3, 2\]"):
        require_same(Segment("param/weight", (4, 3), "float32", "", 0, 48), entries)
    require_same(Segment("param/weight", (3, 2), "float32", "", 0, 24), entries)
