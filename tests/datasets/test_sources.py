"""Documents come out as they went in; a bad one is named with file and line."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gemini.datasets.arrow import arrow_documents
from lightning_gemini.datasets.sources import find, json_documents, text_documents

TEXTS = ["first\r\nline\n", "größer — 漢字 🦎", "x" * 5000, '"quoted" \\u0041']
characters = st.text(st.characters(codec="utf-8"), max_size=20)


def test_what_is_found(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/.hidden/d.txt", ".e.txt", "f.md", "odd[1].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    def names(value: Any) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in find("train", value, (".txt",))]

    assert names(tmp_path) == ["a.txt", "b.txt", "odd[1].txt", "sub/c.txt"]
    assert names(str(tmp_path / "*.txt")) == ["a.txt", "b.txt", "odd[1].txt"]
    assert names(str(tmp_path / "**" / "*.txt")) == ["a.txt", "b.txt", "odd[1].txt", "sub/c.txt"]
    assert names(tmp_path / "f.md") == ["f.md"], "named, so read"
    assert names(tmp_path / "odd[1].txt") == ["odd[1].txt"], "no glob if there is such a file"
    assert names([tmp_path / "b.txt", str(tmp_path / "a.txt"), tmp_path / "b.txt"]) == ["b.txt", "a.txt", "b.txt"]


@pytest.mark.parametrize("value", ["", [], None, 3, [3], ["nowhere.txt"], "*.nothing", "empty/"])
def test_nothing_found_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"train=.* is not valid: .*a file, a folder with \.txt files, a glob, or a list"):
        find("train", value, (".txt",))


@pytest.mark.parametrize("compressed", [False, True])
def test_plain_text(tmp_path: Path, compressed: bool) -> None:
    path = tmp_path / "x.any"
    content = "\ufeffone\r\ntwo  \n\n \n\nthree\rand\n\nfour".encode()
    path.write_bytes(gzip.compress(content) if compressed else content)
    assert list(text_documents(path, "file")) == ["one\r\ntwo  \n\n \n\nthree\rand\n\nfour"]
    assert list(text_documents(path, "line")) == ["one", "two  ", "three\rand", "four"]
    assert list(text_documents(path, "paragraph")) == ["one\ntwo  ", "three\rand", "four"]
    path.write_bytes(b"")
    assert [list(text_documents(path, split)) for split in ("file", "line", "paragraph")] == [[], [], []]


@pytest.mark.parametrize("split", ["file", "line", "paragraph"])
def test_text_that_is_none(tmp_path: Path, split: str) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"good\nb\xe4d\n")
    with pytest.raises(ValueError, match="x.txt:2: not UTF-8 at byte 1 of the line"):
        list(text_documents(path, split))


def test_json_lines(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps({"text": text, "n": 1}) for text in ("", *TEXTS)) + "\n\n  \n"
    (tmp_path / "x.jsonl").write_text(lines)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for name in ("x.jsonl", "x.jsonl.gz"):
        assert list(json_documents(tmp_path / name, "text")) == TEXTS


@settings(max_examples=50, deadline=None)
@given(st.lists(characters), st.booleans())
def test_any_json_line(texts: list[str], escaped: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_text("".join(json.dumps({"body": text}, ensure_ascii=escaped) + "\n" for text in texts), encoding="utf-8")
        assert list(json_documents(path, "body")) == [text for text in texts if text]


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b'{"text": "a', "not a JSON line"),
        (b'["text"]', "a JSON object with the field 'text' was expected"),
        (b'{"body": "a"}', r"no field 'text'; there are \['body'\]"),
        (b'{"text": null}', "field 'text' is NoneType"),
        (b'{"text": 3}', "field 'text' is int"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path: Path, line: bytes, match: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "good \\ud83e\\udd8e"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=f"x.jsonl:3: .*{match}"):
        list(json_documents(path, "text"))


def test_an_archive_cut_short_or_garbled(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    content = gzip.compress(b'{"text": "a"}\n' * 1000)
    for bad in (content[:-9], content[:-40] + b"garbled" + content[-33:], content[:4]):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"x.jsonl.gz:\d+: .*(cut short or garbled|not a JSON line)"):
            list(json_documents(path, "text"))


def as_stream(table: Any, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def as_file(table: Any, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def as_parquet(table: Any, path: Path) -> None:
    pq.write_table(table, path, row_group_size=2)


FORMATS = [as_stream, as_file, as_parquet]
Write = Callable[[Any, Path], None]


@pytest.mark.parametrize("write", FORMATS)
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_arrow_and_parquet(tmp_path: Path, write: Write, kind: Any) -> None:
    path = tmp_path / "x.any"
    write(pa.table({"n": range(5), "text": pa.array(["", *TEXTS], pa.string()).cast(kind)}), path)
    assert list(arrow_documents(path, "text")) == TEXTS
    assert next(arrow_documents(path, "text")) == TEXTS[0], "an iterator that is given up closes its file"


@settings(max_examples=30, deadline=None)
@given(st.lists(characters), st.sampled_from(FORMATS))
def test_any_table(texts: list[str], write: Write) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(pa.table({"text": pa.array(texts, pa.string())}), Path(folder) / "x")
        assert list(arrow_documents(Path(folder) / "x", "text")) == [text for text in texts if text]


@pytest.mark.parametrize("write", FORMATS)
def test_a_bad_table_is_named(tmp_path: Path, write: Write) -> None:
    path = tmp_path / "x.any"
    write(pa.table({"text": ["a", "b", None], "n": [1, 2, 3]}), path)
    for column, match in (
        ("text", "row 2 has no value in column 'text'"),
        ("n", "column 'n' is int64"),
        ("body", r"there are \['n', 'text'\]"),
    ):
        with pytest.raises(ValueError, match=f"x.any: .*{match}"):
            list(arrow_documents(path, column))
    content = path.read_bytes()
    for size in (0, 3, 8, len(content) // 2, len(content) - 20):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="x.any"):
            list(arrow_documents(path, "text"))
    path.write_bytes(b"something else altogether")
    with pytest.raises(ValueError, match="x.any: cut short or garbled"):
        list(arrow_documents(path, "text"))
