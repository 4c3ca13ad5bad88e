"""The GPT recipe: its data, its model, its recorder, and its Hydra configuration."""

import json
import multiprocessing
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from tests.support.forked import Ranks, Tell

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "gpt"
sys.path.insert(0, str(RECIPE))

from gpt_data import TextDataModule, cache_file, source_files  # noqa: E402
from gpt_model import GPT  # noqa: E402
from gpt_recorder import Recorder, digest  # noqa: E402


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_bytes(bytes(i * 7 % 251 for i in range(4000)))
    return file


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def set_up(**kwargs: Any) -> TextDataModule:
    data = TextDataModule(**kwargs)
    data.prepare_data()
    data.setup("fit")
    return data


# ---- data


def test_blocks_are_the_text_one_byte_shifted(text: Path, cache: str) -> None:
    data = set_up(path=str(text), block_size=16, cache_dir=cache, val_fraction=0.1)
    assert data.train_set is not None and data.val_set is not None
    content = text.read_bytes()
    assert len(data.train_set) == 3599 // 16 and len(data.val_set) == 399 // 16
    for dataset, at in ((data.train_set, 0), (data.val_set, 3600)):
        for i in (0, 1, len(dataset) - 1):
            x, y = dataset[i]
            assert x.dtype == y.dtype == torch.int64
            assert bytes(x.tolist()) == content[at + 16 * i : at + 16 * i + 16]
            assert bytes(y.tolist()) == content[at + 16 * i + 1 : at + 16 * i + 17]
        with pytest.raises(IndexError):
            dataset[len(dataset)]
    last = data.train_set[len(data.train_set) - 1][1]
    assert 16 * len(data.train_set) < 3600 and len(last) == 16  # no training sample reaches into the validation text


def test_samples_per_epoch_spreads_over_the_text(text: Path, cache: str) -> None:
    full = set_up(path=str(text), block_size=16, cache_dir=cache).train_set
    some = set_up(path=str(text), block_size=16, cache_dir=cache, samples_per_epoch=10).train_set
    assert full is not None and some is not None and len(some) == 10
    assert [some[i][0].tolist() for i in range(10)] == [full[i * len(full) // 10][0].tolist() for i in range(10)]


def test_dataset_pickles_without_the_text(text: Path, cache: str) -> None:
    dataset = set_up(path=str(text), block_size=16, cache_dir=cache).train_set
    assert dataset is not None
    first = dataset[0][0]
    assert len(blob := pickle.dumps(dataset)) < 1000
    assert torch.equal(pickle.loads(blob)[0][0], first)


def test_train_loader_shuffles_and_val_loader_does_not(text: Path, cache: str) -> None:
    data = set_up(path=str(text), block_size=16, batch_size=8, cache_dir=cache)
    assert data.train_set is not None and data.val_set is not None
    torch.manual_seed(0)
    assert not torch.equal(next(iter(data.train_dataloader()))[0], torch.stack([data.train_set[i][0] for i in range(8)]))
    assert torch.equal(next(iter(data.val_dataloader()))[0], torch.stack([data.val_set[i][0] for i in range(8)]))


def test_files_globs_and_lists(tmp_path: Path, cache: str) -> None:
    (tmp_path / "d").mkdir()
    for name in ("b.txt", "a.txt", "d/c.txt", "x.md"):
        (tmp_path / name).write_text(name * 3)
    names = [os.path.relpath(f, tmp_path) for f in source_files(str(tmp_path / "**/*.txt"))]
    assert names == ["a.txt", "b.txt", "d/c.txt"]
    both = source_files([str(tmp_path / "x.md"), str(tmp_path / "*.txt"), str(tmp_path / "x.md")])
    assert [os.path.relpath(f, tmp_path) for f in both] == ["x.md", "a.txt", "b.txt"]
    assert Path(cache_file(both, 20, cache)).read_bytes() == b"x.mdx.mdx.mda.txta.txt"[:20]


def test_default_text_is_the_standard_library() -> None:
    files = source_files(None)
    assert files == sorted(files) and all(f.endswith(".py") and "site-packages" not in f for f in files)
    assert os.path.join(os.path.dirname(os.__file__), "argparse.py") in files


def test_cache_is_written_once_and_follows_the_text(text: Path, cache: str) -> None:
    file = cache_file(str(text), 1000, cache)
    inode = os.stat(file).st_ino
    assert os.path.getsize(file) == 1000
    assert cache_file(str(text), 1000, cache) == file and os.stat(file).st_ino == inode
    assert cache_file(str(text), 999, cache) != file
    os.utime(text, ns=(1, 1))
    assert cache_file(str(text), 1000, cache) != file
    Path(file).write_bytes(b"cut short")
    os.utime(text, ns=(2, 2))
    again = cache_file(str(text), 1000, cache)
    Path(again).write_bytes(b"cut short")
    assert cache_file(str(text), 1000, cache) == again and os.path.getsize(again) == 1000
    assert not [name for name in os.listdir(cache) if name.endswith(".part")]


def _race(path: str, cache: str, start: Any, out: Any) -> None:
    start.wait()
    out.put(Path(cache_file(path, 10**6, cache)).read_bytes())


def test_cache_is_never_seen_in_part(tmp_path: Path, cache: str) -> None:
    text = tmp_path / "big.txt"
    text.write_bytes(os.urandom(500_000))
    fork = multiprocessing.get_context("fork")
    start, out = fork.Barrier(4), fork.Queue()
    processes = [fork.Process(target=_race, args=(str(text), cache, start, out)) for _ in range(4)]
    for p in processes:
        p.start()
    seen = [out.get(timeout=15) for _ in processes]
    for p in processes:
        p.join()
    assert seen == [text.read_bytes()] * 4
    assert len(os.listdir(cache)) == 1


def test_cache_leaves_nothing_where_writing_fails(text: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("gpt_data.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        cache_file(str(text), 1000, cache)
    assert os.listdir(cache) == []


def test_errors_name_key_value_and_remedy(tmp_path: Path, text: Path, cache: str) -> None:
    def check(*words: str, **kwargs: Any) -> None:
        with pytest.raises(ValueError) as error:
            TextDataModule(**{"path": str(text), "cache_dir": cache, **kwargs})
        assert all(word in str(error.value) for word in words), error.value

    check("data.path='/no/such.txt'", "no file at", "give", path="/no/such.txt")
    check("data.path=[]", "empty", "give", path=[])
    check(f"data.path={str(tmp_path)!r}", "is a directory", "*.txt", path=str(tmp_path))
    check("data.path=", "4000 bytes", "data.block_size=3000", "smaller", block_size=3000)
    check("data.path=", "20 bytes", "data.max_bytes", max_bytes=20)
    check("data.val_fraction=1.5", "between 0 and 1", val_fraction=1.5)
    check("data.batch_size=0", "1 or more", batch_size=0)
    check("data.samples_per_epoch=0", "null", samples_per_epoch=0)
    check("data.num_workers=-1", "0", num_workers=-1)
    check(f"data.cache_dir={str(text)!r}", "cannot write", "writable", cache_dir=str(text))
    data = TextDataModule(str(text), cache_dir=cache)
    text.write_bytes(b"")
    check("data.path=", "0 bytes")
    with pytest.raises(ValueError, match="0 bytes"):  # the text shrank after the constructor's check
        data.setup("fit")


# ---- model


def tiny(**kwargs: Any) -> GPT:
    return GPT(**{"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, **kwargs})


def test_model_shape_causality_and_limits() -> None:
    torch.manual_seed(0)
    model = tiny().eval()
    x = torch.randint(256, (3, 16))
    logits = model(x)
    assert logits.shape == (3, 16, 256)
    changed = x.clone()
    changed[:, 10:] += 1
    assert torch.equal(model(changed % 256)[:, :10], logits[:, :10])
    assert model(x[:, :5]).shape == (3, 5, 256)
    with pytest.raises(ValueError, match=r"model\.block_size=16"):
        model(torch.zeros(1, 17, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"model\.n_embd=17"):
        tiny(n_embd=17)
    model.configure_model()  # without a device mesh it changes nothing
    assert torch.equal(model(x), logits)


def test_learning_rate_schedule() -> None:
    model = tiny(warmup_steps=4, decay_steps=14, min_lr_ratio=0.1)
    factors = [model.lr_factor(s) for s in range(20)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and factors[9] == pytest.approx(0.55)
    assert factors[14:] == pytest.approx([0.1] * 6) and factors[4:] == sorted(factors[4:], reverse=True)
    assert tiny(warmup_steps=0).lr_factor(1000) == 1.0


def test_fsdp2_shards_once_and_computes_the_same(tmp_path: Path) -> None:
    def body(rank: int, tell: Tell) -> None:  # in a process of its own: torch keeps sockets of a DeviceMesh's groups
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        torch.manual_seed(0)
        model = tiny().eval()
        x = torch.randint(256, (2, 16))
        plain, names = model(x), [name for name, _ in model.named_parameters()]
        model._device_mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))  # as the strategy does
        for _ in range(2):
            model.configure_model()
            assert all(isinstance(p, DTensor) for p in model.parameters())
            assert all(type(block).__name__ == "FSDPBlock" for block in model.net.blocks)
        assert [name for name, _ in model.named_parameters()] == names
        torch.testing.assert_close(model(x), plain)
        assert len(digest([*model.named_parameters()])) == 64
        tell("the same")

    ranks = Ranks(body, 1)
    try:
        assert ranks.hear(0) == "the same"
    finally:
        ranks.end()


# ---- recorder


def fit(text: Path, out: Path, cache: str, seed: int = 1) -> dict[str, Any]:
    L.seed_everything(seed, workers=True)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=3, limit_val_batches=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Recorder(str(out))],
    )  # fmt: skip
    trainer.fit(tiny(), datamodule=TextDataModule(str(text), block_size=16, batch_size=2, cache_dir=cache))
    assert os.listdir(out) == ["rank0.json"]
    record: dict[str, Any] = json.loads((out / "rank0.json").read_text())
    return record


@pytest.mark.torch_keeps_descriptors
def test_recorder_tells_equal_runs_from_others(text: Path, tmp_path: Path, cache: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        first, second, other = (fit(text, tmp_path / f"run{i}", cache, seed) for i, seed in enumerate((1, 1, 2)))
    finally:
        torch.set_num_threads(threads)
    assert first == second and first["rank"] == 0 and first["pid"] == os.getpid() and first["steps"] == 3
    assert list(first["losses"]) == ["1", "2", "3"] and all(len(v) == 8 for v in first["losses"].values())
    assert 4 < torch.tensor(int(first["losses"]["1"], 16), dtype=torch.int32).view(torch.float32).item() < 7
    assert all(first[key] != other[key] for key in ("losses", "params", "optimizer"))


def test_recorder_state_survives() -> None:
    a, b = Recorder("x"), Recorder("x")
    a.losses = {1: "00000000", 2: "3f800000"}
    b.load_state_dict(a.state_dict())
    a.losses[3] = "40000000"
    assert b.losses == {1: "00000000", 2: "3f800000"}


def test_digest_sees_bits_types_and_shapes_but_not_key_order() -> None:
    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype)

    values: list[Any] = [zeros(4), -zeros(4), zeros(2, 2), zeros(4, dtype=torch.int32), zeros(4, dtype=torch.bfloat16), zeros(0)]
    values += [torch.tensor(0.0), [zeros(4)], {"a": zeros(4)}, 0, 0.0, None, "0"]
    assert len({digest(v) for v in values}) == len(values)
    assert digest({1: "a", 2: "b"}) == digest({2: "b", 1: "a"})
    assert digest(zeros(2, 3).t()) == digest(zeros(3, 2))


# ---- configuration


def test_config_builds_the_recipe_and_a_strategy_group_replaces_ddp(tmp_path: Path) -> None:
    (tmp_path / "strategy").mkdir()
    (tmp_path / "strategy" / "mine.yaml").write_text("# @package trainer.strategy\n_target_: my.Strategy\n")
    with initialize_config_dir(str(RECIPE / "config"), version_base="1.3"):
        plain = compose("train")
        other = compose("train", overrides=["+strategy=mine", f"hydra.searchpath=[file://{tmp_path}]", "trainer.max_steps=7"])
    assert plain.trainer.strategy == "ddp" and other.trainer.strategy == {"_target_": "my.Strategy"}
    assert other.model.decay_steps == 7
    assert isinstance(instantiate(plain.data), TextDataModule)
    model = instantiate(plain.model)
    assert isinstance(model, GPT) and 1e6 < sum(p.numel() for p in model.parameters()) < 2e6
