"""Several processes and one cache: who builds, who waits, and what a SIGKILL leaves."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_gemini.datasets.lock import exclusive
from tests.datasets.helpers import DOCUMENTS, build, die, die_at, ended, fork, produce, tokens


def settled(source: Path) -> None:
    """Old enough for its hash to be remembered, so that the side file is written too."""
    then = time.time() - 60
    os.utime(source, (then, then))


def complete(cache: Path) -> None:
    """Nothing but what belongs there."""
    names = {path.name.removeprefix("sources") for path in cache.iterdir()}
    keys = {name.partition(".")[0] for name in names} - {""}
    assert len(keys) == 1, names
    assert names - {".json", ".lock"} == {f"{key}.{suffix}" for key in keys for suffix in ("bin", "idx", "json", "lock")}


@pytest.mark.parametrize("processes", [2, 8])
def test_many_builders_make_one_cache(tmp_path: Path, source: Path, processes: int) -> None:
    settled(source)

    def counted() -> Iterator[Any]:
        (tmp_path / f"built by {os.getpid()}").touch()
        for document in produce():
            time.sleep(0.002)
            yield document

    def body() -> None:
        assert tokens(build(tmp_path / "cache", source, counted)) == DOCUMENTS

    children = [fork(body) for _ in range(processes)]
    assert [ended(child) for child in children] == [0] * processes
    assert len(list(tmp_path.glob("built by *"))) == 1
    complete(tmp_path / "cache")


def test_a_builder_killed_at_any_step(tmp_path: Path, source: Path) -> None:
    """Each use of a file in the cache's folder is the last thing that a builder lives to do; then the next one comes."""
    settled(source)
    killed = 0
    for number in range(1, 100):
        cache = tmp_path / f"cache{number}"

        def body(cache: Path = cache, number: int = number) -> None:
            die_at(number, cache)
            build(cache, source)

        status = ended(fork(body))
        assert tokens(build(cache, source)) == DOCUMENTS
        complete(cache)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        killed += 1
    else:
        raise AssertionError("a build uses fewer files than that")
    assert killed >= 12, "the folder, the side file, the lock, the tokens, the index, three renames, the manifest"


@pytest.mark.parametrize("after", [0, 1, 20, len(DOCUMENTS)])
def test_a_builder_killed_among_the_documents(tmp_path: Path, source: Path, after: int) -> None:
    def dying() -> Iterator[Any]:
        for number, document in enumerate(produce()):
            if number == after:
                die()
            yield document
        die()

    assert ended(fork(lambda: build(tmp_path / "cache", source, dying))) == -signal.SIGKILL
    assert list((tmp_path / "cache").glob("*.tmp*"))
    assert tokens(build(tmp_path / "cache", source)) == DOCUMENTS
    complete(tmp_path / "cache")


def test_builders_killed_at_random_while_others_wait(tmp_path: Path, source: Path) -> None:
    """Whoever is left ends with the same tokens."""
    settled(source)
    draw = random.Random(5)

    def slow() -> Iterator[Any]:
        for document in produce():
            time.sleep(0.001)
            yield document

    def body(cache: Path) -> None:
        assert tokens(build(cache, source, slow)) == DOCUMENTS

    for number in range(10):
        cache = tmp_path / f"cache{number}"
        children = [fork(lambda cache=cache: body(cache)) for _ in range(3)]  # type: ignore[misc]
        for child in children[:2]:
            time.sleep(draw.uniform(0, 0.06))
            os.kill(child, signal.SIGKILL)
        assert ended(children[2]) == 0
        assert {ended(child) for child in children[:2]} <= {-signal.SIGKILL, 0}
        body(cache)
        complete(cache)


def test_waiting_has_an_end_and_says_for_whom(tmp_path: Path, source: Path) -> None:
    ready, tell = os.pipe()

    def sleeping() -> Iterator[Any]:
        os.write(tell, b"x")
        time.sleep(20)
        yield np.zeros(1, "<u2")

    child = fork(lambda: build(tmp_path / "cache", source, sleeping))
    try:
        assert os.read(ready, 1) == b"x"
        with pytest.raises(TimeoutError, match=f"locked for 0 s by process {child} on .*: raise cache_timeout_s=0.2, or end that process"):
            build(tmp_path / "cache", source, wait_s=0.2)
    finally:
        os.kill(child, signal.SIGKILL)
        ended(child)
        os.close(ready)
        os.close(tell)
    assert tokens(build(tmp_path / "cache", source, wait_s=5)) == DOCUMENTS, "the kernel gave the lock back"


def test_a_child_forked_meanwhile_does_not_keep_the_lock(tmp_path: Path) -> None:
    with exclusive(tmp_path / "x.lock", 1):
        child = fork(lambda: time.sleep(20))
    try:
        with exclusive(tmp_path / "x.lock", 1):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        ended(child)
