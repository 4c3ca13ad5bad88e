"""One process and its cache: what the key is made of, what is refused, what a full disk does."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_gemini.datasets.cache import Limits, Recipe, build_or_open
from lightning_gemini.datasets.content import Contents
from lightning_gemini.datasets.indexed import IndexedDataset
from lightning_gemini.datasets.store import TokensInMemory
from tests.datasets.helpers import DOCUMENTS, build, ended, fork, produce, recipe, tokens


def never() -> Iterator[Any]:
    raise AssertionError("made again")
    yield


def key(source: Path, directory: Path, **changes: Any) -> str:
    parts: dict[str, Any] = {"sources": [source], "tokenizer": "test", "settings": {"a": 1}, "dtype": np.dtype("<u2"), **changes}
    return Recipe(**parts).key(Contents(directory))


@pytest.fixture
def cache(tmp_path: Path, source: Path) -> Path:
    assert tokens(build(tmp_path / "cache", source)) == DOCUMENTS
    return tmp_path / "cache"


def part(cache: Path, suffix: str) -> Path:
    return next(path for path in cache.glob(f"*.{suffix}") if path.stem != "sources")


def test_the_key_is_the_content_the_settings_and_the_tokenizer(tmp_path: Path, source: Path) -> None:
    first = key(source, tmp_path)
    assert key(source, tmp_path) == first
    other = tmp_path / "elsewhere" / "copy.txt"
    other.parent.mkdir()
    other.write_bytes(source.read_bytes())
    os.utime(other, (1, 1))
    assert key(other, tmp_path) == first, "neither the path nor the time"
    assert key(source, tmp_path, settings={"a": 2}) != first
    assert key(source, tmp_path, tokenizer="test 2") != first
    assert key(source, tmp_path, dtype=np.dtype("<i4")) != first
    assert key(source, tmp_path, sources=[source, other]) != first
    other.write_text("something else")
    assert len({key(source, tmp_path, sources=order) for order in ([source, other], [other, source])}) == 2
    source.write_text("what the tokens are made from, now longer")
    assert key(source, tmp_path) != first


def test_the_second_time_nothing_is_made(cache: Path, source: Path) -> None:
    assert tokens(build(cache, source, never)) == DOCUMENTS
    assert tokens(pickle.loads(pickle.dumps(build(cache, source, never)))) == DOCUMENTS
    assert sorted(path.suffix for path in cache.iterdir()) == [".bin", ".idx", ".json", ".lock"]


def test_only_the_owner_may_look(cache: Path) -> None:
    assert cache.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in cache.iterdir()} == {0o600}


def test_hashes_are_remembered_once_the_file_has_settled(tmp_path: Path, source: Path) -> None:
    build(tmp_path / "cache", source)
    side = tmp_path / "cache" / "sources.json"
    assert not side.exists(), "just written: the next write could have the same time"
    then = time.time() - 60
    os.utime(source, (then, then))
    build(tmp_path / "cache", source, never)
    assert list(json.loads(side.read_text())) == [str(source)]
    # Believed, as long as size, time and inode are the same; and not when one of them is not.
    inode, digest = source.stat().st_ino, Contents(tmp_path).of(source)
    with open(source, "r+") as file:
        file.write("WHAT")
    os.utime(source, ns=(0, json.loads(side.read_text())[str(source)][1]))
    assert source.stat().st_ino == inode
    assert Contents(tmp_path / "cache").of(source) == digest != Contents(tmp_path).of(source)
    os.utime(source, (then - 1, then - 1))
    assert Contents(tmp_path / "cache").of(source) != digest
    for garbage in ("{", "[]", json.dumps({str(source): 1})):
        side.write_text(garbage)
        assert Contents(tmp_path / "cache").of(source) == Contents(tmp_path).of(source)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[30] ^= 1  # in the manifest: the key
    path.write_bytes(content)


def swap(path: Path) -> None:
    path.write_bytes(b"something else altogether")


def link(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def give_away(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("giving a file to another user needs root")
    os.chown(path, 65534, 65534)


@pytest.mark.parametrize("damage", [cut, flip, swap, link, give_away, Path.unlink])
@pytest.mark.parametrize("suffix", ["bin", "idx", "json"])
def test_a_bad_cache_is_refused_and_made_again(
    cache: Path, source: Path, caplog: pytest.LogCaptureFixture, suffix: str, damage: Callable[[Path], None]
) -> None:
    old = build(cache, source, never)
    before = part(cache, suffix).read_bytes()
    keep = [part(cache, other).read_bytes() for other in ("bin", "idx")]
    path = part(cache, suffix)
    damage(path)
    assert tokens(build(cache, source)) == DOCUMENTS
    if (suffix, damage) != ("json", Path.unlink):  # no manifest is no cache: nothing to refuse
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "token cache refused" in caplog.text and str(path) in caplog.text
    assert [part(cache, other).read_bytes() for other in ("bin", "idx")] == keep
    assert path.lstat().st_uid == os.geteuid() and not path.is_symlink() and (suffix == "json" or path.read_bytes() == before)
    assert tokens(build(cache, source, never)) == DOCUMENTS
    if damage not in (cut, flip, swap):  # which write into the file that is mapped
        assert tokens(old) == DOCUMENTS, "maps of the refused cache stay valid"


def test_a_manifest_of_another_key_or_format(cache: Path, source: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = part(cache, "json")
    changes: tuple[dict[str, Any], ...] = ({"key": "0" * 32}, {"format": 0}, {"bin": 1}, {"idx": {}}, {"verified": 3})
    for change in changes:
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        assert tokens(build(cache, source)) == DOCUMENTS
    assert caplog.text.count("token cache refused") == 5


def test_tokens_are_verified_once_per_boot_or_on_demand(cache: Path, source: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, manifest = part(cache, "bin"), part(cache, "json")
    times = data.stat()
    flip(data)
    os.utime(data, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a failing disk would do it
    assert tokens(build_or_open(cache, recipe(source), never)) != DOCUMENTS, "this boot has verified it"
    found = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**found, "verified": {"another boot": [1, 2, 3]}}))
    assert tokens(build(cache, source)) == DOCUMENTS
    assert "another checksum" in caplog.text
    caplog.clear()
    data = part(cache, "bin")
    times = data.stat()
    flip(data)
    os.utime(data, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert tokens(build_or_open(cache, recipe(source), produce, Limits(verify=True))) == DOCUMENTS
    assert "another checksum" in caplog.text
    found = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**found, "verified": {"another boot": [1, 2, 3]}}))
    build(cache, source, never)
    assert len(json.loads(manifest.read_text())["verified"]) == 2, "noted, beside the other machine's"


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a folder to another user needs root")
def test_a_folder_of_another_user(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    os.chown(folder, 65534, 65534)
    with pytest.raises(ValueError, match="cache_directory=.* belongs to user 65534, neither to us .* choose another one"):
        build(folder, source)
    assert not list(folder.iterdir())


def test_a_process_without_descriptors_does_not_blame_the_cache(cache: Path, source: Path) -> None:
    """At each of its opens in turn; with the limit of a real process."""

    def body() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
        taken = []
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        failures = 0
        while failures < 8:
            try:
                assert tokens(build(cache, source, never)) == DOCUMENTS
                break
            except (OSError, ValueError) as error:
                assert "Too many open files" in str(error)
            failures += 1
            os.close(taken.pop())
        assert 2 <= failures < 8

    before = {path.name: path.stat().st_ino for path in cache.iterdir()}
    assert ended(fork(body)) == 0
    assert {path.name: path.stat().st_ino for path in cache.iterdir()} == before


def test_a_producer_that_fails_leaves_nothing(tmp_path: Path, source: Path) -> None:
    def broken() -> Iterator[Any]:
        yield next(produce())
        raise OSError(28, "the source's own disk")

    with pytest.raises(OSError, match="the source's own disk"):
        build(tmp_path / "cache", source, broken)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    assert tokens(build(tmp_path / "cache", source)) == DOCUMENTS


def test_a_source_that_changes_meanwhile(tmp_path: Path, source: Path) -> None:
    def changing() -> Iterator[Any]:
        yield from produce()
        source.write_text("changed while it was tokenised")

    with pytest.raises(ValueError, match="source.txt changed while it was read"):
        build(tmp_path / "cache", source, changing)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    source.unlink()
    with pytest.raises(ValueError, match="source.txt cannot be read: No such file"):
        build(tmp_path / "cache", source)


def test_no_documents_at_all(tmp_path: Path, source: Path) -> None:
    for made in (lambda: iter(()), never):
        found = build(tmp_path / "cache", source, made)
        assert isinstance(found, IndexedDataset) and len(found) == 0


def large(documents: int) -> Iterator[Any]:
    for number in range(documents):
        yield np.full(1000, number, "<u2")


def test_a_full_disk(small_disk: Path, source: Path, caplog: pytest.LogCaptureFixture) -> None:
    """2.4 MB of tokens on a disk of 1 MiB."""
    found = build(small_disk / "cache", source, lambda: large(1200))
    assert isinstance(found, TokensInMemory)
    assert tokens(found) == [[number] * 1000 for number in range(1200)]
    assert tokens(pickle.loads(pickle.dumps(found))) == tokens(found)
    assert "No space left on device" in caplog.text and "with the tokens in memory" in caplog.text
    assert [path.suffix for path in (small_disk / "cache").iterdir()] == [".lock"], "cleaned up"
    with pytest.raises(OSError, match="No space left on device.*more than memory_limit_mib=2: make room, or choose another") as caught:
        build_or_open(small_disk / "cache", recipe(source), lambda: large(1200), Limits(memory_limit_mib=2))
    assert caught.value.filename == str(small_disk / "cache")
    assert tokens(build(small_disk / "cache", source)) == DOCUMENTS, "what fits is kept"
    assert tokens(build(small_disk / "cache", source, never)) == DOCUMENTS


@pytest.mark.parametrize("free", [0, 4096, 8192, 12288, 16384])
def test_a_disk_that_is_full_at_each_step(small_disk: Path, source: Path, free: int) -> None:
    """Pages are taken by the files one by one: the lock, the tokens, the index, the manifest."""
    blocks = small_disk / "ballast"
    status = os.statvfs(small_disk)
    blocks.write_bytes(bytes(max(0, status.f_bavail * status.f_bsize - free)))
    cache = small_disk / "cache"
    assert tokens(build(cache, source)) == DOCUMENTS
    left = {path.suffix for path in cache.iterdir()} if cache.exists() else set()
    assert left in ({".lock"}, {".lock", ".bin", ".idx", ".json"}), "all or nothing"
    blocks.unlink()
    assert tokens(build(cache, source)) == DOCUMENTS
    assert {path.suffix for path in cache.iterdir()} == {".lock", ".bin", ".idx", ".json"}


def test_a_disk_that_cannot_be_written(small_disk: Path, source: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = small_disk / "cache"
    build(cache, source)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True, timeout=10)
    assert isinstance(build(cache, source, never), IndexedDataset), "what is there is used"
    assert not caplog.records
    caplog.set_level(logging.WARNING)
    assert tokens(build(cache, source, other=1)) == DOCUMENTS
    assert "Read-only file system" in caplog.text
