"""Orders of events that were wrong once: each of these tests failed before its fix."""

from __future__ import annotations

import gc
import os
import resource
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_gemini.mapped.encoding import decode, encode
from lightning_gemini.mapped.feed import BatchGone
from lightning_gemini.state import rng
from tests.mapped.helpers import Feeders, Samples, is_gone, of, reader, rest, same, seed, state, train


def own(size: int, workers: int = 0) -> DataLoader[torch.Tensor]:
    """Shuffled by a generator of its own."""
    generator = torch.Generator().manual_seed(5)
    return DataLoader(Samples(size), batch_size=4, shuffle=True, generator=generator, num_workers=workers)


@pytest.mark.parametrize("size", [18, 20])
def test_epochs_of_a_loader_with_its_own_generator(feeders: Feeders, size: int) -> None:
    """Its sampler draws once more at the end of its indices: with 20, that is after the last batch."""
    seed()
    expected, generators = train(own(size), 3), state()
    seed()
    same(train(feeders.mapped(own(size)), 3), expected)
    assert state() == generators


@pytest.mark.parametrize("size", [18, 20])
def test_a_checkpoint_at_the_end_of_an_epoch_with_its_own_generator(feeders: Feeders, size: int) -> None:
    seed()
    expected = train(own(size), 2)
    seed()
    loader = feeders.mapped(own(size), over=lambda: True)
    first, saved = train(loader), loader.state_dict()
    torch.manual_seed(99)
    again = feeders.mapped(own(size))
    again.load_state_dict(saved)
    same(first + train(again), expected)


@pytest.mark.parametrize("with_own", [False, True])
def test_something_is_drawn_before_the_first_batch(feeders: Feeders, with_own: bool) -> None:
    """A callback's `on_train_start`, for instance: after `iter()`, which has drawn a seed."""

    def drawn(loader: object) -> list[torch.Tensor]:
        batches: Iterator[torch.Tensor] = iter(loader)  # type: ignore[call-overload]
        torch.rand(1)
        return list(batches)

    def make() -> DataLoader[torch.Tensor]:
        return own(18) if with_own else DataLoader(Samples(18), batch_size=4, shuffle=True)

    seed()
    expected, generators = drawn(make()), state()
    seed()
    same(drawn(feeders.mapped(make())), expected)
    assert state() == generators


def test_a_checkpoint_when_a_batch_was_read_ahead_and_none_was_used(feeders: Feeders) -> None:
    seed()
    loader = feeders.mapped(DataLoader(Samples(20), batch_size=4, shuffle=True), ahead=lambda: 1)
    batches = iter(loader)
    found = [next(batches)]
    saved = loader.state_dict()
    found += list(batches)
    torch.manual_seed(99)
    again = feeders.mapped(DataLoader(Samples(20), batch_size=4, shuffle=True))
    again.load_state_dict(saved)
    same(list(again), found)


def test_good_bye_after_a_batch_was_gone(feeders: Feeders) -> None:
    """What the rank has asked for in between must not cost it its good-bye."""
    name = feeders.feed(of(Samples(40)), lookback_length=0, prefetch_length=1)
    rest(reader(name), 9)
    late = reader(name, 2)
    with pytest.raises(BatchGone):
        late.next()
    late.close(bye=True)
    assert is_gone(feeders.started[feeders.newest], 10)


def test_shared_memory_that_the_data_writes_again_is_copied(feeders: Feeders) -> None:
    class Same:
        def __iter__(self) -> Iterator[torch.Tensor]:
            buffer = torch.zeros(1 << 17).share_memory_()
            for i in range(6):
                buffer.fill_(i)
                yield buffer

    feed = reader(feeders.feed(Same()))
    assert [int(batch[0]) for batch in rest(feed)] == list(range(6))
    feed.close(bye=True)


def test_an_encoded_batch_is_freed_with_its_last_reference() -> None:
    """Or a loader process would grow until the garbage collector's next full run."""
    gc.collect()
    gc.disable()
    try:
        batch = torch.zeros(1 << 20)
        alive = weakref.ref(batch)
        encoded = encode({"x": batch})
        del encoded, batch
        assert alive() is None
    finally:
        gc.enable()


def test_batches_that_the_user_keeps_take_no_descriptor(feeders: Feeders) -> None:
    _, hard = limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    loader = feeders.mapped(of(Samples(400), batch_size=1))
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 150, hard))
    try:
        assert len(list(loader)) == 400
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_name_of_any_length(feeders: Feeders) -> None:
    assert len(list(feeders.mapped(of(Samples(6)), name="x" * 300))) == 3


def test_nested_tensors() -> None:
    """Pickled, as all that is not dense; with torch's own layout for them where it can be."""
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    found = decode(bytearray(b"".join(encode(nested).parts)))
    assert torch.equal(found[1], torch.ones(3))


def test_states_of_generators_are_bytes() -> None:
    """So that two of them can be compared."""
    held = {"own": torch.Generator().manual_seed(3)}
    first = rng.capture_private(held)
    torch.rand(5, generator=held["own"])
    assert rng.capture_private(held) != first
    rng.restore_private(held, first)
    assert rng.capture_private(held) == first
