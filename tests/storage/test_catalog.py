"""What is listed, kept and removed: on local files and in memory; never a half checkpoint, never a file of others."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gemini.storage import catalog, layout
from lightning_gemini.storage.catalog import Checkpoint, chosen
from lightning_gemini.storage.files import Folder
from lightning_gemini.storage.layout import FORMAT, METADATA, SUMMARY, Summary, is_ours


@pytest.fixture(params=["local", "file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    memory = f"memory://{uuid.uuid4().hex}"
    yield {"local": str(tmp_path / "a" / "b"), "file": f"file://{tmp_path}/c", "memory": memory}[request.param]
    if request.param == "memory" and fsspec.filesystem("memory").exists(memory):
        fsspec.filesystem("memory").rm(memory, recursive=True)


def make(url: str, step: int, attempt: str = "a", *, complete: bool = True) -> str:
    folder = Folder(f"{url}/{layout.directory(step, attempt)}")
    folder.make("gemini")
    for name in (FORMAT, "__0_0.distcp", "gemini/node-0.part", "gemini/rank-0.state", "meta.pt"):
        folder.write(name, b"1")
    folder.write(SUMMARY, msgspec.json.encode(Summary(1, step, 2, 1)))
    if complete:
        folder.publish(METADATA, b"index")
    return folder.url


def steps(url: str) -> list[int]:
    return [found.step for found in catalog.complete(url)]


def test_only_complete_ones_of_ours_are_listed(url: str) -> None:
    assert steps(url) == [] and catalog.newest(url) is None
    for step in (30, 4, 200):
        make(url, step)
    make(url, 300, complete=False)
    theirs = Folder(f"{url}/step-400.theirs")
    theirs.make()
    theirs.write(METADATA, b"x")  # somebody else's checkpoint of DCP
    Folder(f"{url}/step-500.b").make()
    Folder(f"{url}/lightning_logs").make()
    assert steps(url) == [4, 30, 200]
    newest = catalog.newest(url)
    assert newest == Checkpoint(200, f"{Folder(url).url}/step-200.a") and newest.name == "step-200.a"


def test_retention(url: str) -> None:
    for step in range(10, 80, 10):
        make(url, step)
    make(url, 35, "dead", complete=False)
    make(url, 75, "running", complete=False)
    kept = f"{Folder(url).url}/step-10.a"
    removed = catalog.retain(url, keep_last=2, keep_every_n_steps=40, in_use=[kept])
    assert removed == ["step-20.a", "step-30.a", "step-35.dead", "step-50.a"]
    assert steps(url) == [10, 40, 60, 70]
    assert "step-75.running" in Folder(url).folders(), "newer than the newest: somebody may be writing it"
    assert catalog.retain(url, keep_last=0) == ["step-10.a", "step-40.a", "step-60.a"], "the newest one stays"


@given(st.sets(st.integers(0, 300), max_size=20), st.integers(1, 5), st.none() | st.integers(1, 100))
def test_what_is_chosen(numbers: set[int], last: int, every: int | None) -> None:
    present = [Checkpoint(step, f"p/{step}") for step in sorted(numbers)]
    kept = {int(path[2:]) for path in chosen(present, keep_last=last, keep_every_n_steps=every)}
    assert set(sorted(numbers)[-last:]) <= kept <= numbers
    if every:
        assert {step // every for step in kept} == {step // every for step in numbers}, "one of every n steps"
        assert {step for step in numbers if step % every == 0} <= kept
    else:
        assert len(kept) == min(last, len(numbers))


def test_files_of_others_stay(url: str) -> None:
    path = Folder(make(url, 1))
    make(url, 2)
    path.write("notes.txt", b"mine")
    path.write("gemini/other", b"mine")
    Folder(url).write("readme", b"mine")
    assert catalog.retain(url, keep_last=1) == ["step-1.a"]
    assert path.files() == ["gemini/other", "notes.txt"] and Folder(url).read("readme") == b"mine"


class Refuses(Folder):
    """Can remove `.metadata` and nothing else."""

    def remove(self, name: str) -> None:
        if name != METADATA:
            raise OSError(f"{name} may not be removed")
        super().remove(name)


def test_a_half_removed_one_is_not_listed_and_removed_later(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make(url, 1)
    make(url, 2)
    with monkeypatch.context() as patch:
        patch.setattr(catalog, "Folder", Refuses)
        with pytest.raises(OSError, match="may not be removed"):
            catalog.retain(url, keep_last=1)
    assert steps(url) == [2] and "step-1.a" in Folder(url).folders() or url.startswith("memory")
    assert catalog.retain(url, keep_last=1) == ["step-1.a"]


def test_where_a_job_begins(url: str) -> None:
    assert catalog.start(url, "auto") is None and catalog.start(url, "never") is None
    first, last = make(url, 1), make(url, 2)
    found = catalog.start(url, "auto")
    assert found == Checkpoint(2, last) and catalog.summary(last) == Summary(1, 2, 2, 1)
    assert catalog.start(url, last) == found and catalog.start(url, f"{last}/") == found
    for wrong in ("never", first):
        with pytest.raises(ValueError, match=r"persistent.resume=.* has a newer checkpoint of step 2.*: give another persistent.url"):
            catalog.start(url, wrong)
    assert catalog.start(f"{url}-new", first) == Checkpoint(1, first), "of another place"


@pytest.mark.parametrize("resume", ["/no/such/place", "https-but-no-url", ""])
def test_a_path_that_is_no_checkpoint(resume: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"persistent.resume=.* is no complete checkpoint"):
        catalog.start(str(tmp_path), resume)


def test_a_url_that_nobody_knows() -> None:
    with pytest.raises(ValueError, match=r"persistent.url='nosuch://x' cannot be used: .*driver installed"):
        catalog.complete("nosuch://x")


def test_names() -> None:
    assert layout.directory(7, "ab-1_2") == "step-7.ab-1_2"
    with pytest.raises(AssertionError):
        layout.directory(7, "a/b")
    assert is_ours("__12_0.distcp") and is_ours(".metadata.tmp") and is_ours("gemini/node-3.part")
    assert not any(map(is_ours, ["x/__1_0.distcp", "meta.pt.bak", "gemini/node-.part", "model.ckpt", "gemini/../x"]))


def test_a_damaged_file_is_named(url: str) -> None:
    path = Folder(make(url, 1))
    path.write(SUMMARY, b"{")
    with pytest.raises(ValueError, match="gemini/checkpoint.json is damaged"):
        catalog.summary(path.url)
