"""DCP's private corners are there, and mean what we think."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from lightning_gemini.compat import dcp


def test_entries_are_those_of_its_own_writer(tmp_path: Path) -> None:
    checkpoint.save({"x": torch.arange(3)}, checkpoint_id=tmp_path)
    metadata = dcp.reader(str(tmp_path)).read_metadata()
    own = metadata.storage_data[MetadataIndex("x", (0,))]
    assert own == dcp.entry("__0_0.distcp", 0, (tmp_path / "__0_0.distcp").stat().st_size)
    assert getattr(metadata, "version", None) == getattr(dcp.stamp(Metadata({})), "version", None)


def test_the_reader_knows_urls(tmp_path: Path) -> None:
    checkpoint.save({"x": torch.arange(3)}, checkpoint_id=tmp_path)
    state = {"x": torch.zeros(3, dtype=torch.int64)}
    checkpoint.load(state, storage_reader=dcp.reader(f"file://{tmp_path}"))
    assert state["x"].tolist() == [0, 1, 2]


def test_private_names_exist() -> None:
    assert filesystem._StorageInfo("x", 0, 1).relative_path == "x"
