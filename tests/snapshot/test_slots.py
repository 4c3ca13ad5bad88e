"""The two slots: one of them is always whole, whenever the writer dies."""

from __future__ import annotations

import mmap
import os
import random
import resource
import signal
import time
from collections.abc import Iterator

import pytest
import xxhash

from lightning_gemini.snapshot.slots import PAGE, CorruptSnapshot, Slot, SlotFile

HEADER_STRIDE = 64


@pytest.fixture
def fd() -> Iterator[int]:
    descriptor = os.memfd_create("test-slots", os.MFD_CLOEXEC)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def file(fd: int) -> Iterator[SlotFile]:
    slots = SlotFile(fd)
    slots.allocate(10_000)
    yield slots
    slots.close()


def test_a_new_file_has_no_slots(fd: int) -> None:
    empty = SlotFile(fd)
    assert (empty.slots(), empty.find(0), empty.capacity) == ([], None, 0)
    empty.allocate(1)
    assert (empty.slots(), empty.find(0), empty.capacity) == ([], None, PAGE)
    empty.close()


@pytest.mark.parametrize("touch", [True, False])
def test_memory_is_taken_in_whole_pages(fd: int, touch: bool) -> None:
    slots = SlotFile(fd)
    slots.allocate(PAGE + 1, touch=touch)
    assert slots.capacity == 2 * PAGE
    assert os.fstat(fd).st_size == 5 * PAGE
    assert (os.fstat(fd).st_blocks * 512 >= 5 * PAGE) is touch
    slots.close()


def test_what_was_written_is_read(file: SlotFile) -> None:
    file.write(b"state", step=3, kind=2)
    slot = file.find(3)
    assert slot is not None
    assert (slot.step, slot.kind, slot.length) == (3, 2, 5)
    assert file.read(slot) == b"state"


@pytest.mark.parametrize("step", [-1, 0, 1 << 40])
def test_steps_of_all_sizes(file: SlotFile, step: int) -> None:
    file.write(b"", step=step, kind=0)
    slot = file.find(step)
    assert slot is not None and file.read(slot) == b""


def test_the_two_newest_are_kept(file: SlotFile) -> None:
    for step in range(5):
        file.write(b"%d" % step, step=step, kind=0)
        assert [slot.step for slot in file.slots()] == list(range(max(0, step - 1), step + 1))
    assert [file.read(slot) for slot in file.slots()] == [b"3", b"4"]
    assert file.find(2) is None


def test_of_two_slots_of_one_step_the_newer_is_found(file: SlotFile) -> None:
    file.write(b"on entering", step=7, kind=2)
    file.write(b"on leaving", step=7, kind=3)
    slot = file.find(7)
    assert slot is not None and (slot.kind, file.read(slot)) == (3, b"on leaving")


def test_filling_gives_up_only_the_older_slot(file: SlotFile) -> None:
    for step in (1, 2):
        file.write(b"x", step=step, kind=0)
    file.begin()
    assert [slot.step for slot in file.slots()] == [2]
    file.write(b"y", step=3, kind=0)  # a writer that began and never committed is passed over
    assert [slot.step for slot in file.slots()] == [2, 3]


def test_a_forgotten_slot_is_used_next(file: SlotFile) -> None:
    for step in (1, 2):
        file.write(b"x", step=step, kind=0)
    newest = file.slots()[-1]
    file.invalidate(newest)
    assert [slot.step for slot in file.slots()] == [1]
    file.write(b"z", step=3, kind=0)
    assert [slot.step for slot in file.slots()] == [1, 3]
    assert file.slots()[-1].place == newest.place


@pytest.mark.parametrize("position", range(48))
def test_a_torn_header_counts_as_empty(file: SlotFile, position: int) -> None:
    """Each byte of the header, its seal included."""
    file.write(b"x", step=1, kind=0)
    file.write(b"x", step=2, kind=0)
    place = file.slots()[-1].place
    file.memory[place * HEADER_STRIDE + position] ^= 0x10
    assert [slot.step for slot in file.slots()] == [1]


@pytest.mark.parametrize("position", [0, 4095, 9999])
def test_a_flipped_byte_is_noticed(file: SlotFile, position: int) -> None:
    file.write(bytes(10_000), step=1, kind=0)
    (slot,) = file.slots()
    file.memory[PAGE + slot.place * file.capacity + position] ^= 1
    with pytest.raises(CorruptSnapshot, match="step 1: checksum differs"):
        file.read(slot)


def test_what_was_read_is_a_copy(file: SlotFile) -> None:
    file.write(b"before", step=1, kind=0)
    (slot,) = file.slots()
    data = file.read(slot)
    with file.payload(slot.place) as view:
        view[:6] = b"after!"
    assert data == b"before"


def test_too_much_is_refused_and_nothing_is_lost(file: SlotFile) -> None:
    for step in (1, 2):
        file.write(b"x", step=step, kind=0)
    with pytest.raises(ValueError, match=f"{file.capacity + 1} bytes does not fit its slot of {file.capacity}"):
        file.write(bytes(file.capacity + 1), step=3, kind=0)
    assert [slot.step for slot in file.slots()] == [1, 2]
    file.write(bytes(file.capacity), step=3, kind=0)
    assert len(file.read(file.slots()[-1])) == file.capacity


def test_allocating_again_forgets_everything(file: SlotFile) -> None:
    file.write(b"x", step=1, kind=0)
    file.allocate(3 * PAGE)
    assert (file.slots(), file.capacity) == ([], 3 * PAGE)


def test_memory_that_cannot_be_had_is_an_error(fd: int) -> None:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # never try with a size the machine might try to serve
            SlotFile(fd).allocate(1 << 21)
        except OSError:
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_reader_with_its_own_mapping(fd: int, file: SlotFile) -> None:
    file.write(b"shared", step=1, kind=0)
    reader = SlotFile(fd)
    assert reader.capacity == file.capacity
    file.write(b"later", step=2, kind=0)
    assert [reader.read(slot) for slot in reader.slots()] == [b"shared", b"later"]
    reader.close()


# ---- kill -9 in the middle


def content(step: int, size: int) -> bytes:
    """Bytes that only this step has."""
    return random.Random(step).randbytes(64) * (size // 64)


def write_for_ever(fd: int, size: int, first: int) -> None:
    """What the writer does until it is killed: half of the time by `write`, else in pieces as the arena does."""
    slots = SlotFile(fd)
    for step in range(first, 1 << 30):
        data = content(step, size)
        if step % 2:
            slots.write(data, step=step, kind=1)
            continue
        index = slots.begin()
        with slots.payload(index) as view:
            for start in range(0, size, 4096):
                view[start : start + 4096] = data[start : start + 4096]
        slots.commit(index, step=step, kind=1, length=size, digest=xxhash.xxh3_64_intdigest(data))


def check(slots: SlotFile, size: int) -> Slot:
    """Every committed slot is whole; returns the newest."""
    found = slots.slots()
    assert found, "no whole version is left"
    for slot in found:
        assert slots.read(slot) == content(slot.step, size), f"step {slot.step} has other bytes"
    return found[-1]


def test_a_writer_killed_at_any_moment_leaves_a_whole_version(fd: int) -> None:
    size, slots, rng = 256 * 1024, SlotFile(fd), random.Random(1)
    slots.allocate(size)
    slots.write(content(1, size), step=1, kind=1)
    newest = 1
    for _ in range(40):
        pid = os.fork()
        if pid == 0:
            try:
                write_for_ever(fd, size, newest + 1)
            finally:
                os._exit(1)
        time.sleep(rng.random() * 0.015)
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        step = check(slots, size).step
        assert step >= newest, "went back"
        newest = step
    assert newest > 40, "the writer never got anywhere"
    slots.close()


def test_memory_outlives_its_writer_and_no_longer(fd: int) -> None:
    """A memfd has no name: when its last descriptor is closed, the kernel frees it."""
    slots = SlotFile(fd)
    slots.allocate(mmap.PAGESIZE)
    slots.write(b"x", step=1, kind=0)
    assert os.fstat(fd).st_nlink == 0
    slots.close()


def test_a_step_that_is_written_again_may_take_its_own_slot(file: SlotFile) -> None:
    for step in (4, 5):
        file.write(b"first", step=step, kind=0)
    place = file.begin(5)
    assert [slot.step for slot in file.slots()] == [4], "the older one stays"
    with file.payload(place) as view:
        view[:5] = b"again"
    file.commit(place, step=5, kind=0, length=5, digest=xxhash.xxh3_64_intdigest(b"again"))
    assert [(slot.step, file.read(slot)) for slot in file.slots()] == [(4, b"first"), (5, b"again")]
    assert file.begin(7) != place, "otherwise the older one is taken"
