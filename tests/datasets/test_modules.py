"""The four data modules: trained with, shared among ranks, made by Hydra; and what their settings refuse."""

from __future__ import annotations

import gc
import gzip
import json
import os
import pickle
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lightning_gemini.datasets import ArrowDataModule, IndexedDataModule, IndexedWriter, JsonLinesDataModule, TextDataModule
from lightning_gemini.datasets.modules import default_cache
from tests.datasets.helpers import LIMIT_S, ended, fork

TEXTS = [f"document {n}: " + "lorem ipsum " * (n % 4) for n in range(40)]
STREAM = [token for text in TEXTS for token in (*text.encode(), 256)]


@pytest.fixture
def collected() -> Iterator[None]:
    """A Trainer and its model refer to each other, a data module to itself: the maps are closed when the garbage is collected."""
    yield
    gc.collect()


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = torch.nn.Embedding(257, 4), torch.nn.Linear(4, 257)
        self.seen: list[list[int]] = []

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.out(self.table(batch["input_ids"])).flatten(0, 1), batch["labels"].flatten())

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        self.seen += batch["input_ids"].tolist()
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Validated(Model):
    def __init__(self) -> None:
        super().__init__()
        self.validated: list[list[int]] = []

    def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        self.validated += batch["input_ids"].tolist()


M = TypeVar("M", bound=Model)


def fit(data: pl.LightningDataModule, epochs: int = 1) -> Model:
    return fitted(Model(), data, epochs)


def fitted(model: M, data: pl.LightningDataModule, epochs: int = 1) -> M:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    pl.Trainer(max_epochs=epochs, accelerator="cpu", devices=1, num_sanity_val_steps=0, **quiet).fit(model, datamodule=data)
    return model


def text(folder: Path) -> pl.LightningDataModule:
    (folder / "a.txt").write_text("\n".join(TEXTS[:25]))
    (folder / "b.txt").write_text("\n".join(TEXTS[25:]))
    return TextDataModule(train=str(folder), val=folder / "b.txt", split="line", **common(folder))


def json_lines(folder: Path) -> pl.LightningDataModule:
    lines = [json.dumps({"body": text}) + "\n" for text in TEXTS]
    (folder / "a.jsonl").write_text("".join(lines[:25]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[25:]).encode()))
    return JsonLinesDataModule(train=[folder / "a.jsonl", folder / "b.jsonl.gz"], val=str(folder / "b*"), field="body", **common(folder))


def arrow(folder: Path) -> pl.LightningDataModule:
    first, second = pa.table({"text": TEXTS[:25]}), pa.table({"text": TEXTS[25:]})
    with pa.OSFile(str(folder / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, first.schema) as writer:
        writer.write_table(first)
    pq.write_table(second, folder / "b.parquet")
    return ArrowDataModule(train=folder, val=folder / "b.parquet", **common(folder))


def indexed(folder: Path) -> pl.LightningDataModule:
    for name, texts in (("train", TEXTS), ("val", TEXTS[25:])):
        with IndexedWriter(folder / name, "u2") as writer:
            for document in texts:
                writer.add([*document.encode(), 256])
                writer.end_document()
    options = common(folder)
    del options["cache_directory"]
    return IndexedDataModule(train=folder / "train", val=f"{folder / 'val'}.idx", **options)


def common(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"sequence_length": 8, "batch_size": 5, "shuffle": False, "cache_directory": folder / "cache", **changes}


@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize("made", [text, json_lines, arrow, indexed])
def test_training_with_each(tmp_path: Path, made: Callable[[Path], pl.LightningDataModule]) -> None:
    model = fitted(Validated(), made(tmp_path))
    assert [token for row in model.seen for token in row] == STREAM[: (len(STREAM) - 1) // 8 * 8]
    rest = [token for text in TEXTS[25:] for token in (*text.encode(), 256)]
    assert [token for row in model.validated for token in row] == rest[: (len(rest) - 1) // 8 * 8]


def lines(folder: Path, **changes: Any) -> TextDataModule:
    (folder / "a.txt").write_text("\n".join(TEXTS))
    return TextDataModule(train=folder / "a.txt", split="line", **common(folder, **changes))


@pytest.mark.usefixtures("collected")
def test_the_order_is_of_the_seed_and_the_epoch(tmp_path: Path) -> None:
    first, again = (fit(lines(tmp_path, shuffle=True, seed=3, num_workers=workers), epochs=2).seen for workers in (0, 2))
    assert first == again
    half = len(first) // 2
    assert sorted(first[:half]) == sorted(first[half:]) == sorted(fit(lines(tmp_path)).seen), "every sample in every epoch"
    assert first[:half] != first[half:] and first != fit(lines(tmp_path, shuffle=True, seed=4), epochs=2).seen


@pytest.mark.usefixtures("collected")
def test_ranks_share_the_samples(tmp_path: Path) -> None:
    """Lightning's own DDP, two ranks; one of them makes the cache."""
    whole = fit(lines(tmp_path, cache_directory=tmp_path / "alone")).seen
    data = lines(tmp_path, shuffle=True)

    def rank(number: int, port: int) -> None:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
        model = Model()
        quiet: dict[str, Any] = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        pl.Trainer(max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", **quiet).fit(model, datamodule=data)
        (tmp_path / f"rank{number}").write_text(json.dumps(model.seen))

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    children = [fork(lambda number=number: rank(number, port)) for number in range(2)]  # type: ignore[misc]
    assert [ended(child, LIMIT_S) for child in children] == [0, 0]
    seen = [row for number in range(2) for row in json.loads((tmp_path / f"rank{number}").read_text())]
    padded = len(seen) - len(whole)
    assert padded in (0, 1) and {tuple(row) for row in seen} == {tuple(row) for row in whole}


@pytest.mark.usefixtures("collected")
def test_the_cache_is_made_beforehand_and_once(tmp_path: Path) -> None:
    lines(tmp_path).prepare_data()
    data = next((tmp_path / "cache").glob("*.bin"))
    then = data.stat()
    other = lines(tmp_path, sequence_length=5)
    other.setup("fit")
    assert (data.stat().st_ino, data.stat().st_mtime_ns) == (then.st_ino, then.st_mtime_ns)
    assert len(list((tmp_path / "cache").glob("*.bin"))) == 1, "the sequence's length changes no token"
    TextDataModule(train=tmp_path / "a.txt", split="file", **common(tmp_path)).setup()
    assert len(list((tmp_path / "cache").glob("*.bin"))) == 2


@pytest.mark.usefixtures("collected")
def test_without_validation(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(validation|val_dataloader|across ranks is zero)")
        fit(lines(tmp_path))
        fit(pickle.loads(pickle.dumps(lines(tmp_path))))

    class Other(TextDataModule):
        def val_dataloader(self) -> Any:
            return self.train_dataloader()

    model = fitted(Validated(), Other(train=tmp_path / "a.txt", **common(tmp_path)))
    assert model.validated == model.seen, "a subclass may still bring its own"


@pytest.mark.usefixtures("collected")
def test_a_module_travels(tmp_path: Path) -> None:
    data = lines(tmp_path)
    data.setup()
    again = pickle.loads(pickle.dumps(data))
    assert [batch["labels"].tolist() for batch in again.train_dataloader()] == [
        batch["labels"].tolist() for batch in data.train_dataloader()
    ]


@pytest.mark.usefixtures("collected")
def test_training_with_a_full_disk(tmp_path: Path, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes((1 << 20) - 8192))
    seen = fit(lines(tmp_path, cache_directory=small_disk / "cache")).seen
    assert seen == fit(lines(tmp_path)).seen and not list((small_disk / "cache").glob("*.bin"))


@pytest.mark.usefixtures("collected")
def test_where_the_cache_is_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    lines(tmp_path, cache_directory=None).setup()
    assert len(list((tmp_path / "xdg" / "lightning_gemini").glob("*.bin"))) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache() == tmp_path / "home" / ".cache" / "lightning_gemini"


@pytest.mark.usefixtures("collected")
def test_hydra_makes_them(tmp_path: Path) -> None:
    lines(tmp_path)
    node = OmegaConf.create(
        {
            "_target_": "lightning_gemini.datasets.TextDataModule",
            "train": ["${folder}/a.txt", "${folder}/*.txt"],
            "val": "${folder}/a.txt",
            "sequence_length": 8,
            "tokenizer": {"_target_": "tests.datasets.test_tokenizer.Letters"},
            "cache_directory": "${folder}/cache",
            "folder": str(tmp_path),
        }
    )
    settings = {key: value for key, value in OmegaConf.to_container(node, resolve=True).items() if key != "folder"}  # type: ignore[union-attr]
    for config in (settings, OmegaConf.create(settings)):
        data = instantiate(config)
        data.setup("fit")
        assert type(data) is TextDataModule and len(data.train_dataloader()) > 2 * len(data.val_dataloader()) - 2
        assert data.tokenizer.dtype == "int32"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"sequence_length": 0}, "sequence_length=0 is not valid: give a whole number, 1 or more"),
        ({"batch_size": True}, "batch_size=True is not valid"),
        ({"batch_size": 2.5}, "batch_size=2.5 is not valid"),
        ({"num_workers": -1}, "num_workers=-1 is not valid"),
        ({"seed": "x"}, "seed='x' is not valid"),
        ({"shuffle": "yes"}, "shuffle='yes' is not valid: give true or false"),
        ({"pin_memory": 1}, "pin_memory=1 is not valid"),
        ({"verify": None}, "verify=None is not valid"),
        ({"cache_timeout_s": 0}, "cache_timeout_s=0 is not valid"),
        ({"memory_limit_mib": -1}, "memory_limit_mib=-1 is not valid"),
        ({"cache_directory": ""}, "cache_directory='' is not valid"),
        ({"train": None}, "train=None is not valid: say where the training data is"),
        ({"train": "nowhere.txt"}, "train='nowhere.txt' is not valid: no such file"),
        ({"val": "nowhere.txt"}, "val='nowhere.txt' is not valid: no such file"),
        ({"split": "word"}, "split='word' is not valid: choose one of file, line, paragraph"),
        ({"tokenizer": "nowhere.json"}, "tokenizer='nowhere.json' is not valid: no such file"),
        ({"tokenizer": len}, "tokenizer_identity=None is not valid"),
    ],
)
def test_bad_settings_are_told_at_once(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=match):
        TextDataModule(**{"train": tmp_path / "a.txt", **common(tmp_path), **changes})
    assert not (tmp_path / "cache").exists()


def test_bad_settings_of_the_others(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("text")
    for module, changes, match in (
        (JsonLinesDataModule, {"field": ""}, "field='' is not valid"),
        (ArrowDataModule, {"column": None}, "column=None is not valid"),
    ):
        with pytest.raises(ValueError, match=match):
            module(train=tmp_path / "a", **common(tmp_path), **changes)
    for prefix in (tmp_path / "nowhere", 3):
        with pytest.raises(ValueError, match="train=.* is not valid: no such data set: give the prefix"):
            IndexedDataModule(train=prefix, sequence_length=8)
    with pytest.raises(TypeError, match="sequence_lenght"):
        TextDataModule(train=tmp_path / "a", sequence_lenght=8)


def test_too_little_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("1234567")
    with pytest.raises(ValueError, match="train=.* is not valid: 8 tokens, one sample needs 9: give more data"):
        TextDataModule(train=tmp_path / "a.txt", **common(tmp_path)).setup()


def test_a_bad_document_is_named_and_no_cache_is_left(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": 3}\n')
    with pytest.raises(ValueError, match="a.jsonl:2: field 'text' is int"):
        JsonLinesDataModule(train=tmp_path / "a.jsonl", **common(tmp_path)).prepare_data()
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
