"""The CUDA side. Skipped where there is no GPU; everything else about it is tested on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lightning_gemini.agent.memory import create_files
from lightning_gemini.rendezvous import backends
from lightning_gemini.rendezvous.store import PeerStore
from lightning_gemini.snapshot import arena, blocks
from lightning_gemini.snapshot.cuda import SideStream, pin
from lightning_gemini.snapshot.slots import SlotFile
from lightning_gemini.state import rng
from lightning_gemini.state.catalogue import Entry, copy_in
from lightning_gemini.state.ownership import Layout, owned
from tests.support.peers import Peers

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def file() -> Iterator[SlotFile]:
    files = create_files(1)
    made = SlotFile(files.arenas[0])
    made.allocate(1 << 22)
    yield made
    made.close()
    files.close()


def round_trip(file: SlotFile, device: torch.device) -> None:
    tensor = torch.rand(300, 700, device=device)
    before, stream = tensor.clone(), SideStream(device)
    mine = owned([Entry("param/x", tensor, (0,), "", tuple(tensor.shape), (0, 0))], Layout(0, 1, 1, 1))
    stream.mark()
    with stream:
        arena.capture(file, 3, mine, chunk=1 << 16)
    slot = file.find(3)
    assert slot is not None
    blocks.verify(file, slot)
    tensor.zero_()
    arena.restore(file, slot, lambda segment, data: copy_in(tensor, segment.start, data), wanted=lambda _: True)
    assert torch.equal(tensor, before)


def test_on_the_cpu_the_side_stream_is_nothing(file: SlotFile) -> None:
    assert not pin(file.memory, torch.device("cpu"))
    round_trip(file, torch.device("cpu"))


@needs_gpu
def test_pinned_copy_on_a_side_stream(file: SlotFile) -> None:
    assert pin(file.memory, torch.device("cuda"))
    round_trip(file, torch.device("cuda"))


@needs_gpu
def test_the_device_generator_belongs_to_a_boundary() -> None:
    device = torch.device("cuda")
    state: dict[str, Any] = rng.capture(device)
    first = torch.rand(8, device=device)
    rng.restore(state, device)
    assert torch.equal(torch.rand(8, device=device), first)


@needs_gpu
def test_nccl_is_formed_aborted_and_formed_anew(peers: Peers) -> None:
    """A group of one: what can be said about NCCL with a single GPU."""
    (node,) = peers.world(1)
    for generation in range(3):
        node.open(generation)
        store = PeerStore(node, generation=generation, prefix=f"{generation}/")
        group = backends.form_nccl(store, 0, 1, 30.0)
        x = torch.ones(8, device="cuda")
        group.allreduce([x]).wait()
        torch.cuda.synchronize()
        assert x.sum().item() == 8
        backends.abort_nccl(group)
