"""Tensors to shared memory and back: every layout, torn copies, corrupt bytes, and no view on the slot survives."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import torch

from lightning_gemini.snapshot import arena, blocks
from lightning_gemini.snapshot.manifest import Segment, manifest_of
from lightning_gemini.snapshot.slots import PAGE, CorruptSnapshot, SlotFile
from lightning_gemini.state.catalogue import copy_in
from lightning_gemini.state.ownership import Layout, Owned, owned
from tests.support.entries import entry

CHUNK = 4096


@pytest.fixture
def file() -> Iterator[SlotFile]:
    fd = os.memfd_create("test-arena", os.MFD_CLOEXEC)
    slots = SlotFile(fd)
    slots.allocate(1 << 20)
    yield slots
    slots.close()
    os.close(fd)


def whole(**tensors: torch.Tensor) -> Owned:
    """All bytes of private tensors."""
    return owned([entry(name, tensor, (0,)) for name, tensor in tensors.items()], Layout(0, 1, 1, 1))


def read_back(file: SlotFile, step: int, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """New tensors with what the slot of `step` has."""
    slot = file.find(step)
    assert slot is not None
    blocks.verify(file, slot)
    found = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in like.items()}
    arena.restore(file, slot, lambda segment, data: copy_in(found[segment.name], segment.start, data), wanted=lambda _: True)
    return found


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, NaN and negative zero included."""
    return a.dtype == b.dtype and a.shape == b.shape and a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()


MANY = {
    "f32": torch.randn(3000, generator=torch.Generator().manual_seed(1)),
    "f32_special": torch.tensor([0.0, -0.0, float("nan"), float("inf"), 1e-45]),
    "f64": torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)),
    "int64": torch.arange(-500, 500),
    "uint8": torch.arange(256, dtype=torch.uint8),
    "bool": torch.tensor([True, False, True]),
    "scalar": torch.tensor(17.5),
    "step": torch.tensor(3, dtype=torch.int64),
    "empty": torch.empty(0),
    "empty_2d": torch.empty(0, 4, dtype=torch.int64),
    "transposed": torch.arange(5000.0).reshape(50, 100).t(),
    "every_other": torch.arange(4000)[::2],
    "expanded": torch.tensor([1.5]).expand(1200),
    "channels_last": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)).contiguous(memory_format=torch.channels_last),
}


def test_round_trip_of_every_layout(file: SlotFile) -> None:
    arena.capture(file, 5, whole(**MANY), chunk=CHUNK)
    for name, tensor in read_back(file, 5, MANY).items():
        assert same_bits(tensor, MANY[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8, torch.complex64], ids=str)
def test_round_trip_of_more_dtypes(file: SlotFile, dtype: torch.dtype) -> None:
    tensor = torch.arange(-2000, 2000).to(torch.float32).to(dtype)
    arena.capture(file, 1, whole(x=tensor), chunk=CHUNK)
    assert torch.equal(read_back(file, 1, {"x": tensor})["x"].view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("chunk", [4096, 4100, 1 << 20])
def test_the_chunk_does_not_matter(file: SlotFile, chunk: int) -> None:
    arena.capture(file, 1, whole(**MANY), chunk=CHUNK)
    arena.capture(file, 2, whole(**MANY), chunk=chunk)
    first, second = file.slots()
    assert first.length == second.length and blocks.verify(file, first).chunk == CHUNK
    assert blocks.verify(file, second).chunk == chunk
    with file.payload(first.place) as one, file.payload(second.place) as two:
        assert one[: first.length] == two[: first.length]


@pytest.mark.parametrize("tensor", [torch.zeros(4, 6), torch.zeros(6, 4).t()], ids=["contiguous", "transposed"])
def test_copy_in_writes_only_its_bytes(tensor: torch.Tensor) -> None:
    tensor.zero_()
    copy_in(tensor, 8 * 4, torch.full((4,), 1.0).view(torch.uint8))
    assert tensor.flatten().tolist() == [0.0] * 8 + [1.0] * 4 + [0.0] * 12


def test_a_live_parameter_is_restored_in_place(file: SlotFile) -> None:
    parameter = torch.nn.Parameter(torch.randn(100))
    saved, place = parameter.detach().clone(), parameter.data_ptr()
    arena.capture(file, 1, whole(p=parameter), chunk=CHUNK)
    with torch.no_grad():
        parameter.zero_()
    slot = file.slots()[-1]
    arena.restore(file, slot, lambda segment, data: copy_in(parameter, segment.start, data), wanted=lambda _: True)
    assert torch.equal(parameter, saved) and parameter.data_ptr() == place and parameter.requires_grad


def test_segments_of_several_owners_make_the_whole(file: SlotFile) -> None:
    entries = [entry(name, tensor, (0, 1, 2)) for name, tensor in MANY.items()]
    found = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in MANY.items()}
    for rank in range(3):
        arena.capture(file, rank, owned(entries, Layout(rank, 3, 3, 1)), chunk=CHUNK)
        slot = file.find(rank)
        assert slot is not None
        arena.restore(file, slot, lambda segment, data: copy_in(found[segment.name], segment.start, data), wanted=lambda _: True)
    for name, tensor in found.items():
        assert same_bits(tensor, MANY[name]), name


def test_only_wanted_segments_are_handed_out(file: SlotFile) -> None:
    arena.capture(file, 1, whole(**MANY), chunk=CHUNK)
    seen: dict[str, bytes] = {}

    def put(segment: Segment, data: torch.Tensor) -> None:
        seen[segment.name] = data.numpy().tobytes()

    arena.restore(file, file.slots()[-1], put, wanted=lambda segment: segment.name in ("int64", "bool"))
    assert seen == {name: MANY[name].numpy().tobytes() for name in ("int64", "bool")}


def test_the_local_state_lies_beside_the_tensors(file: SlotFile) -> None:
    arena.capture(file, 1, whole(**MANY), chunk=CHUNK, local=b"loops and generators")
    manifest, _ = manifest_of(file, file.slots()[-1])
    assert manifest.local == b"loops and generators"
    assert [segment.name for segment in manifest.segments] == list(MANY)


def test_restored_tensors_do_not_change_with_the_slot(file: SlotFile) -> None:
    """A rival diverges silently because an optimizer adopted a view on shared memory."""
    arena.capture(file, 1, whole(**MANY), chunk=CHUNK)
    found = read_back(file, 1, MANY)
    with file.payload(file.slots()[-1].place) as view:
        view[:] = b"\xff" * len(view)
    for name, tensor in found.items():
        assert same_bits(tensor, MANY[name]), name


def test_a_snapshot_does_not_change_with_the_tensors(file: SlotFile) -> None:
    tensor = torch.arange(2000.0)
    arena.capture(file, 1, whole(x=tensor), chunk=CHUNK)
    tensor.zero_()
    assert torch.equal(read_back(file, 1, {"x": tensor})["x"], torch.arange(2000.0))


# ---- what must not be committed


def test_a_write_since_the_boundary_is_torn(file: SlotFile) -> None:
    tensors = {"a": torch.zeros(5), "b": torch.zeros(5)}
    mine = whole(**tensors)
    arena.capture(file, 1, mine, chunk=CHUNK)
    expected = arena.versions(mine.tensors)
    tensors["b"].add_(1)
    with pytest.raises(arena.Torn, match="while step 2 was copied"):
        arena.capture(file, 2, mine, chunk=CHUNK, expected=expected)
    assert [slot.step for slot in file.slots()] == [1]
    arena.capture(file, 2, mine, chunk=CHUNK, expected=arena.versions(mine.tensors))
    assert torch.equal(read_back(file, 2, tensors)["b"], torch.ones(5))


def test_a_writer_in_another_thread_is_noticed(file: SlotFile) -> None:
    tensor = torch.zeros(200_000)
    mine = whole(x=tensor)
    expected, started, stop = arena.versions([tensor]), threading.Event(), threading.Event()

    def write() -> None:
        while not stop.is_set():
            tensor.add_(1)
            started.set()

    thread = threading.Thread(target=write)
    thread.start()
    try:
        started.wait()
        with pytest.raises(arena.Torn):
            arena.capture(file, 1, mine, chunk=CHUNK, expected=expected)
    finally:
        stop.set()
        thread.join()
    assert file.slots() == []


def test_an_optimizer_counts_as_a_writer() -> None:
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.Adam(model.parameters())
    before = arena.versions(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    assert arena.versions(model.parameters()) == before
    optimizer.step()
    assert all(now > then for now, then in zip(arena.versions(model.parameters()), before, strict=True))


def test_a_detached_alias_has_the_same_version() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    alias = parameter.detach()
    with torch.no_grad():
        parameter.add_(1)
    assert arena.versions([alias]) == arena.versions([parameter])


def test_state_that_has_grown_does_not_fit(file: SlotFile) -> None:
    arena.capture(file, 1, whole(x=torch.ones(10)), chunk=CHUNK)
    with pytest.raises(MemoryError, match="the optimizer's state has grown"):
        arena.capture(file, 2, whole(x=torch.zeros(file.capacity // 4 + 1)), chunk=CHUNK)
    assert [slot.step for slot in file.slots()] == [1]


def test_payload_size_is_enough() -> None:
    fd = os.memfd_create("test-arena", os.MFD_CLOEXEC)
    slots = SlotFile(fd)
    many = whole(**{f"net.{'layer.' * 12}{i}.weight": torch.ones(i % 5) for i in range(300)})
    local = os.urandom(9000)
    size = arena.payload_size(many, CHUNK, local)
    slots.allocate(size)
    arena.capture(slots, 1, many, chunk=CHUNK, local=local)
    assert size - slots.slots()[-1].length < 300 * 400
    slots.close()
    os.close(fd)


@pytest.mark.parametrize("where", ["manifest", "first byte", "last byte"])
def test_a_flipped_bit_is_found_before_anything_is_written(file: SlotFile, where: str) -> None:
    arena.capture(file, 1, whole(**MANY), chunk=CHUNK)
    (slot,) = file.slots()
    _, begin = manifest_of(file, slot)
    position = {"manifest": 20, "first byte": begin, "last byte": slot.length - 1}[where]
    file.memory[PAGE + slot.place * file.capacity + position] ^= 1
    with pytest.raises(CorruptSnapshot, match="tensors of step 1"):
        blocks.verify(file, slot)
