"""Megatron's format: what is written is read, byte for byte as the format says, and nothing else is taken for it."""

from __future__ import annotations

import pickle
import re
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gemini.datasets.indexed import DTYPES, IndexedDataset
from lightning_gemini.datasets.writer import IndexedWriter

NAMES = ["u1", "i1", "i2", "i4", "i8", "f8", "f4", "u2"]


def write(prefix: Path, documents: list[list[list[int]]], dtype: str = "u2") -> Path:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            for sequence in document:
                writer.add(sequence)
            writer.end_document()
    return prefix


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return write(tmp_path / "a.b", [[[1, 2, 3], [4]], [[]], [[5, 65535]]])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NAMES), st.lists(st.lists(st.lists(st.integers(0, 127), max_size=9), max_size=4), max_size=6))
def test_what_is_written_is_read(dtype: str, documents: list[list[list[int]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = IndexedDataset(write(Path(folder) / "x", documents, dtype))
        sequences = [sequence for document in documents for sequence in document]
        assert found.dtype == np.dtype(dtype)
        assert [found[i].tolist() for i in range(len(found))] == sequences
        assert found.lengths.tolist() == [len(sequence) for sequence in sequences]
        assert np.diff(found.documents).tolist() == [len(document) for document in documents]
        again = pickle.loads(pickle.dumps(found))
        assert [again[i].tolist() for i in range(len(again))] == sequences


def test_the_bytes_are_the_format_s(prefix: Path) -> None:
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 4, 4)
    expected += struct.pack("<4i", 3, 1, 0, 2) + struct.pack("<4q", 0, 6, 8, 8) + struct.pack("<4q", 0, 2, 3, 4)
    assert Path(f"{prefix}.idx").read_bytes() == expected
    assert Path(f"{prefix}.bin").read_bytes() == struct.pack("<6H", 1, 2, 3, 4, 5, 65535)


@pytest.mark.parametrize("code", DTYPES)
def test_each_dtype_code(tmp_path: Path, code: int) -> None:
    """Written by hand, sequences out of order, as after a merge."""
    dtype = np.dtype(NAMES[code - 1])
    (tmp_path / "x.bin").write_bytes(np.array([7, 8, 9], dtype).tobytes())
    index = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, code, 2, 2)
    index += struct.pack("<2i2q2q", 1, 2, 2 * dtype.itemsize, 0, 0, 2)
    (tmp_path / "x.idx").write_bytes(index)
    found = IndexedDataset(tmp_path / "x")
    assert (found[0].tolist(), found[1].tolist(), found.dtype, found.modes) == ([9], [7, 8], dtype, None)
    (tmp_path / "x.idx").write_bytes(index + b"\x00\x01")
    modes = IndexedDataset(tmp_path / "x").modes
    assert modes is not None and modes.tolist() == [0, 1]


def test_a_sequence_is_a_view(prefix: Path) -> None:
    found = IndexedDataset(f"{prefix}.idx")
    assert np.shares_memory(found[0], found.get(0, 1)) and not found[0].flags.writeable
    assert (found.get(0, 1).tolist(), found.get(0, 1, 1).tolist(), found.get(0, 3).tolist(), found[-1].tolist()) == (
        [2, 3],
        [2],
        [],
        [5, 65535],
    )
    for wrong in (4, -5):
        with pytest.raises(IndexError):
            found[wrong]
    with pytest.raises(IndexError, match="offset 4 in a sequence of 3"):
        found.get(0, 4)


def refused(prefix: Path, match: str) -> None:
    """Not `pytest.raises`: what that keeps refers to itself and so to the maps, until the garbage collector comes by."""
    try:
        IndexedDataset(prefix)
    except ValueError as error:
        assert re.search(match, str(error)) and prefix.name in str(error), "says what is wrong, and with which file"
    else:
        raise AssertionError("not refused")


def test_an_index_cut_short_anywhere_is_refused(prefix: Path) -> None:
    path = Path(f"{prefix}.idx")
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        refused(prefix, "cut short")
    path.write_bytes(content + b"more")  # as many as there are sequences: these are modes
    assert IndexedDataset(prefix).modes is not None
    path.write_bytes(content + b"more!")
    refused(prefix, "its header tells of")


def test_tokens_cut_short_anywhere_are_refused(prefix: Path) -> None:
    path = Path(f"{prefix}.bin")
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        refused(prefix, "cut short or garbled")


@pytest.mark.parametrize(
    ("at", "data", "match"),
    [
        (0, b"PK\x03\x04", "not an index of Megatron's"),
        (9, struct.pack("<Q", 2), "version 2"),
        (17, b"\x00", "dtype code 0"),
        (17, b"\x09", "dtype code 9"),
        (18, struct.pack("<Q", 1 << 63), "its header tells of"),
        (26, struct.pack("<Q", (1 << 64) - 1), "its header tells of"),
        (34, struct.pack("<i", -1), "sequence 0 has -1 tokens"),
        (34, struct.pack("<i", (1 << 31) - 1), "sequence 0 has 2147483647 tokens"),
        (58, struct.pack("<q", -8), "at byte -8"),
        (58, struct.pack("<q", (1 << 63) - 1), "at byte 9223372036854775807"),
        (82, struct.pack("<q", 1), "documents begin and end at"),
        (90, struct.pack("<q", 9), "not in order"),
        (106, struct.pack("<q", 3), "documents begin and end at"),
    ],
)
def test_a_garbled_index_is_refused(prefix: Path, at: int, data: bytes, match: str) -> None:
    path = Path(f"{prefix}.idx")
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(content)
    refused(prefix, match)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 113), st.integers(0, 255))
def test_no_byte_leads_out_of_the_file(at: int, value: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prefix = write(Path(folder) / "x", [[[1, 2, 3], [4]], [[]], [[5, 65535]]])
        content = bytearray(Path(f"{prefix}.idx").read_bytes())
        content[at] = value
        Path(f"{prefix}.idx").write_bytes(content)
        try:
            found = IndexedDataset(prefix)
        except ValueError:
            return
        for i in range(len(found)):
            assert len(found[i]) == found.lengths[i]


@pytest.mark.parametrize("missing", ["bin", "idx"])
def test_a_missing_file(prefix: Path, missing: str) -> None:
    Path(f"{prefix}.{missing}").unlink()
    refused(prefix, f"{missing}: no such file")


def test_a_file_that_changed_is_not_unpickled(prefix: Path) -> None:
    pickled = pickle.dumps(IndexedDataset(prefix))
    with open(f"{prefix}.bin", "ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match="load them anew"):
        pickle.loads(pickled)


@pytest.mark.parametrize(
    ("dtype", "sequence", "match"),
    [
        ("u2", [65536], "do not fit uint16"),
        ("u2", [-1], "do not fit uint16"),
        ("i4", np.array([1 << 40]), "do not fit int32"),
        ("u2", [0.5], "type float64"),
        ("u2", ["a"], "type <U1"),
        ("u2", [[1], [2]], "one dimension"),
    ],
)
def test_what_would_change_is_not_written(tmp_path: Path, dtype: str, sequence: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match), IndexedWriter(tmp_path / "x", dtype) as writer:
        writer.add([1])
        writer.add(sequence)
    assert not list(tmp_path.iterdir())


def test_the_writer_overwrites_nothing(prefix: Path) -> None:
    before = IndexedDataset(prefix)[0].tolist()
    with pytest.raises(FileExistsError):
        IndexedWriter(prefix, "u2")
    assert IndexedDataset(prefix)[0].tolist() == before
    with pytest.raises(ValueError, match="dtype='c16' is not valid"):
        IndexedWriter(prefix, "c16")


def test_a_finished_writer_is_finished(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "x", "i4")
    writer.add([1, 2])
    data, index = writer.finish()
    assert (data.size, index.size) == (8, 34 + 12 + 16)
    writer.abandon()
    assert IndexedDataset(tmp_path / "x")[0].tolist() == [1, 2]
    for again in (writer.finish, lambda: writer.add([3])):
        with pytest.raises(RuntimeError, match="is closed"):
            again()
