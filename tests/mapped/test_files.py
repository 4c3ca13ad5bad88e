"""Nameless files: where they lie, what is on the disk, and what is left of them."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gemini.mapped.encoding import Buffer, Encoded
from lightning_gemini.mapped.files import Held, Shelf, new_key, opened, read

TEXT = b"the quick brown fox jumps over the lazy dog" * 100


def put(shelf: Shelf, parts: Sequence[Buffer]) -> Held:
    return shelf.put(Encoded([*parts], []))


def content(held: Held, key: bytes = b"") -> bytes:
    return bytes(opened(read(held.fds[0], held.size), key))


def whole(held: Held, key: bytes = b"") -> bytes:
    found = content(held, key)
    held.close()
    return found


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@given(st.lists(st.binary(max_size=5000), min_size=1, max_size=9).filter(any))
@settings(max_examples=40, deadline=None)
def test_what_is_put_is_read(parts: list[bytes]) -> None:
    assert whole(put(Shelf(None), parts)) == b"".join(parts)


@pytest.mark.parametrize("count", [1, 511, 512, 513, 1024, 1025, 3000])
def test_many_parts(count: int, tmp_path: Path) -> None:
    """More than one system call takes; some of them empty."""
    parts = [str(i).encode() * (i % 5) for i in range(count)] + [b"end"]
    for directory in (None, str(tmp_path)):
        assert whole(put(Shelf(directory), parts)) == b"".join(parts)
    assert whole(put(Shelf(None), [memoryview(b"".join(parts))[1:], bytearray(b"x")])) == b"".join(parts)[1:] + b"x"


@pytest.mark.parametrize("key", [b"", new_key()], ids=["plain", "encrypted"])
def test_a_directory_holds_nothing_that_has_a_name(tmp_path: Path, key: bytes) -> None:
    shelf = Shelf(str(tmp_path), key)
    held = [put(shelf, [b"batch %d" % i]) for i in range(5)]
    assert os.listdir(tmp_path) == []
    for one in held:
        assert os.readlink(f"/proc/self/fd/{one.fds[0]}").startswith(str(tmp_path)), "but they lie there"
        assert os.fstat(one.fds[0]).st_nlink == 0 and os.fstat(one.fds[0]).st_mode & 0o777 == 0o600
    assert [whole(one, key) for one in held] == [b"batch %d" % i for i in range(5)]
    assert os.listdir(tmp_path) == []


def test_shared_memory_without_a_directory() -> None:
    held = put(Shelf(None), [b"x"])
    assert "memfd:" in os.readlink(f"/proc/self/fd/{held.fds[0]}")
    assert not os.get_inheritable(held.fds[0])
    held.close()


def test_maps_outlive_their_file(tmp_path: Path) -> None:
    held = put(Shelf(str(tmp_path)), [TEXT])
    mapped = read(held.fds[0], held.size)
    held.close()
    assert bytes(mapped) == TEXT


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    if os.geteuid():
        pytest.skip("only root mounts file systems")
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "small", str(tmp_path)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no file system can be mounted: {made.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_full_directory(small: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is said once; batches go on in shared memory, and nothing half-written stays."""
    shelf, before = Shelf(str(small)), descriptors()
    with caplog.at_level(logging.WARNING):
        held = [put(shelf, [bytes([i]) * 300_000]) for i in range(8)]
    places = ["memfd:" in os.readlink(f"/proc/self/fd/{one.fds[0]}") for one in held]
    assert places == [False] * 3 + [True] * 5
    assert len(descriptors()) == len(before) + 8
    assert [whole(one) for one in held] == [bytes([i]) * 300_000 for i in range(8)]
    assert [record.getMessage() for record in caplog.records] == [
        f"mapped_data.directory={small}: No space left on device; batches go to shared memory from here on"
    ]
    assert os.statvfs(small).f_bavail == os.statvfs(small).f_blocks and descriptors() == before


def test_a_directory_that_is_gone_is_an_error(tmp_path: Path) -> None:
    before = descriptors()
    with pytest.raises(FileNotFoundError):
        put(Shelf(str(tmp_path / "gone")), [b"x"])
    assert descriptors() == before


def test_the_disk_has_ciphertext(tmp_path: Path) -> None:
    key = new_key()
    held = put(Shelf(str(tmp_path), key), [TEXT[:1000], TEXT[1000:]])
    on_disk = os.pread(held.fds[0], 1 << 20, 0)
    assert len(on_disk) == held.size and b"fox" not in on_disk and key not in on_disk
    again = put(Shelf(str(tmp_path), key), [TEXT])
    assert os.pread(again.fds[0], 1 << 20, 0) != on_disk, "the same batch is never the same bytes"
    assert whole(held, key) == whole(again, key) == TEXT


def test_another_key_is_refused(tmp_path: Path) -> None:
    exceptions = pytest.importorskip("cryptography.exceptions")
    held = put(Shelf(str(tmp_path), new_key()), [TEXT])
    before = descriptors()
    with pytest.raises(exceptions.InvalidTag):
        content(held, new_key())
    assert descriptors() == before
    held.close()


@pytest.mark.parametrize("place", [0, 11, 12, 500, -17, -1])
def test_a_flipped_byte_is_refused(tmp_path: Path, place: int) -> None:
    exceptions = pytest.importorskip("cryptography.exceptions")
    key = new_key()
    held = put(Shelf(str(tmp_path), key), [TEXT])
    at = place % held.size
    byte = os.pread(held.fds[0], 1, at)[0]
    os.pwrite(held.fds[0], bytes([byte ^ 1]), at)
    with pytest.raises(exceptions.InvalidTag):
        content(held, key)
    held.close()


def test_keys_differ() -> None:
    assert len({new_key() for _ in range(20)}) == 20 and len(new_key()) == 32


def test_no_descriptor_stays() -> None:
    before = descriptors()
    for _ in range(300):
        whole(put(Shelf(None), [b"x" * 100]))
    assert descriptors() == before


def test_shared_memory_stays_where_it_is() -> None:
    """Its descriptor is kept until the batch is given back."""
    before = descriptors()
    shared = os.memfd_create("of a worker")
    os.write(shared, TEXT)
    held = Shelf(None).put(Encoded([b"own"], [(shared, len(TEXT))]))
    os.close(shared)
    assert held.size == 3 + len(TEXT) and Shelf(None).shares
    assert [bytes(read(fd, size)) for fd, size in zip(held.fds, held.sizes, strict=True)] == [b"own", TEXT]
    held.close()
    assert descriptors() == before
    assert not Shelf("/tmp").shares and not Shelf(None, new_key()).shares
