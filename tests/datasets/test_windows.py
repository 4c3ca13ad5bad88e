"""Every token once, in order, in whichever process."""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from lightning_gemini.datasets.indexed import IndexedDataset
from lightning_gemini.datasets.store import TokensInMemory, TokenStore, in_memory
from lightning_gemini.datasets.windows import TokenWindows
from lightning_gemini.datasets.writer import IndexedWriter

documents = st.lists(st.lists(st.integers(0, 65535), max_size=12), max_size=12)


def held(sequences: list[list[int]]) -> TokensInMemory:
    return in_memory((np.array(sequence, "<u2") for sequence in sequences), np.dtype("<u2"), 1 << 20)


def written(folder: Path, sequences: list[list[int]], dtype: str = "u2") -> IndexedDataset:
    with IndexedWriter(folder / "x", dtype) as writer:
        for sequence in sequences:
            writer.add(sequence)
            writer.end_document()
    return IndexedDataset(folder / "x")


def check(store: TokenStore, sequences: list[list[int]], length: int) -> None:
    stream = [token for sequence in sequences for token in sequence]
    windows = TokenWindows(store, length)
    assert windows.token_count == len(stream)
    samples = [windows[i] for i in range(len(windows))]
    inputs = [token for sample in samples for token in sample["input_ids"].tolist()]
    labels = [token for sample in samples for token in sample["labels"].tolist()]
    assert inputs == stream[: len(inputs)] and labels == stream[1 : len(labels) + 1], "each once, in order"
    assert 0 <= len(stream) - 1 - len(inputs) < length or not stream, "what is left is less than a window"
    assert all(sample[name].shape == (length,) and sample[name].dtype == torch.int64 for sample in samples for name in sample)


@settings(max_examples=150, deadline=None)
@given(documents, st.integers(1, 9))
def test_every_token_once(sequences: list[list[int]], length: int) -> None:
    check(held(sequences), sequences, length)


@settings(max_examples=30, deadline=None)
@given(documents, st.integers(1, 9))
def test_every_token_once_from_files(sequences: list[list[int]], length: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(written(Path(folder), sequences), sequences, length)


def test_samples_are_their_own(tmp_path: Path) -> None:
    windows = TokenWindows(written(tmp_path, [list(range(20))]), 4)
    sample = windows[1]
    sample["input_ids"].fill_(99)
    assert sample["labels"].tolist() == [5, 6, 7, 8] and windows[1]["input_ids"].tolist() == [4, 5, 6, 7]
    assert windows[-1]["labels"].tolist() == [13, 14, 15, 16], "from the end, as lists have it"
    for wrong in (4, -5):
        with pytest.raises(IndexError):
            windows[wrong]


def test_loader_workers_read_the_same(tmp_path: Path) -> None:
    windows = TokenWindows(written(tmp_path, [list(range(n)) for n in range(60)]), 16)
    loader = DataLoader(windows, batch_size=4, num_workers=2)
    found = [row for batch in loader for row in batch["input_ids"].tolist()]
    assert found == [windows[i]["input_ids"].tolist() for i in range(len(windows))]


def test_a_pickled_one_maps_its_files_again(tmp_path: Path) -> None:
    windows = TokenWindows(written(tmp_path, [list(range(1000))] * 50), 10)
    pickled = pickle.dumps(windows)
    assert len(pickled) < 1000, "neither tokens nor offsets travel"
    again = pickle.loads(pickled)
    assert len(again) == len(windows) and again[333]["labels"].tolist() == windows[333]["labels"].tolist()


def test_what_is_no_stream_of_tokens(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype='float32' is not valid"):
        TokenWindows(written(tmp_path, [[1, 2]], "f4"), 1)
    with pytest.raises(ValueError, match="sequence_length=0 is not valid"):
        TokenWindows(held([[1]]), 0)
