"""The recipe's configurations: the models they describe, and what is refused before a process is started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.utilities.seed import isolate_rng

from tests.llama.models import RECIPE, llama
from tests.support.campaign import more

SIZES = {"tiny": 180_800, "160m": 162_417_408, "1b": 1_235_814_400, "8b": 8_030_261_248, "70b": 70_553_706_496}


def composed(*overrides: str) -> Any:
    sys.path.insert(0, str(RECIPE))
    import train  # noqa: F401  it registers a resolver

    with initialize_config_dir(str(RECIPE / "config"), version_base="1.3"):
        return compose("train", [*overrides])


@pytest.mark.parametrize("model", SIZES)
def test_published_sizes(model: str) -> None:
    """On the meta device: no weight has memory."""
    cfg = composed(f"model={model}")
    sys.path.insert(0, str(RECIPE))
    from llama_model import build

    with torch.device("meta"):
        net = build(instantiate(cfg.model).options)
    assert sum(parameter.numel() for parameter in net.parameters()) == SIZES[model]
    assert cfg.trainer.accelerator == ("gpu" if model in ("8b", "70b") else "cpu")


@pytest.mark.parametrize(("model", "trained"), [("8b", 41_943_040), ("70b", 207_093_760)])
def test_adapters(model: str, trained: int) -> None:
    """Rank 16 on all seven projections."""
    from llama_model import build

    cfg = composed(f"model={model}", "lora=r16")
    with torch.device("meta"):
        net = build(instantiate(cfg.model).options, instantiate(cfg.model).lora)
    assert sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad) == trained
    assert sum(parameter.numel() for parameter in net.parameters() if not parameter.requires_grad) == SIZES[model]


@pytest.mark.parametrize("lora", ["none", "r16"])
def test_the_weights_are_what_transformers_would_compute_with(lora: str) -> None:
    """Building on the meta device loses nothing: the same state in a network built the plain way gives the same logits."""
    from llama_model import build

    cfg = composed(f"lora={lora}")
    module = instantiate(cfg.model)
    with isolate_rng():
        module.configure_model()
        plain = build(module.options, module.lora)
    plain.load_state_dict(module.net.state_dict())
    ids = torch.arange(24).reshape(2, 12)
    assert torch.equal(plain.eval()(input_ids=ids).logits, module.net.eval()(input_ids=ids).logits)


def test_weights_depend_on_the_seed_and_on_nothing_else() -> None:
    first, same, other = (llama(seed=seed) for seed in (1, 1, 2))
    for module in (first, same, other):
        torch.rand(3)
        module.configure_model()
    pairs = list(zip(first.parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs) and any(not torch.equal(a, c) for a, _, c in pairs)


BAD = {
    "sizes": (["+strategy=gemini_fsdp2", "trainer.strategy.data_parallel_size=3"], "trainer.strategy.data_parallel_size=3 is not"),
    "gpu": (["model=8b"], "trainer.accelerator=gpu with trainer.devices=8, but this machine has 0 GPUs"),
}
BAD_MORE = {
    "replicas": (["+strategy=gemini_fsdp2", "model.replicate=3", "trainer.devices=4"], "model.replicate=3 does not divide the 4 ranks"),
    "replicas of ddp": (["+strategy=gemini", "model.replicate=2"], "model.replicate=2 is for sharded training"),
    "tensor parallel": (["+strategy=gemini_fsdp2", "trainer.strategy.tensor_parallel_size=2"], "tensor_parallel_size=2: this recipe"),
}


@pytest.mark.parametrize("name", [*BAD, *BAD_MORE])
def test_bad_sizes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides, message = (BAD | BAD_MORE)[name]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    cfg = composed(*overrides)
    from train import check

    with pytest.raises(ValueError, match=message):
        check(cfg)


@pytest.mark.parametrize("name", ["gpu", *more("sizes")])
def test_one_error_and_no_process(tmp_path: Path, name: str) -> None:
    overrides, message = (BAD | BAD_MORE)[name]
    line = [sys.executable, str(RECIPE / "train.py"), f"hydra.run.dir={tmp_path}", *overrides]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(line, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and done.stderr.count(f"llama: {message}") == 1 and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "gemini").exists()
