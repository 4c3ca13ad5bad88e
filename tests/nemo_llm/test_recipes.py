"""The recipes: composed by Hydra with recovery on, checked against the signatures of NeMo's own classes, and against their launch files."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "nemo_llm"
NAMES = sorted(path.stem for path in (RECIPES / "config").glob("*.yaml") if path.stem != "base")
LLM = "nemo.collections.llm"
NEWER = {f"{LLM}.GPTOSSConfig120B": f"{LLM}.GPTConfig", f"{LLM}.GPTOSSModel": f"{LLM}.GPTModel"}
"""Classes that the pinned NeMo does not have yet, and what they derive from: 2.7 has them."""
GIVEN = {"data.paths": "[/data/corpus]", "data.dataset_root": "/data/squad", "resume.restore_config.path": "/models/base"}
"""What the recipes leave to the user."""
WORLDS = {"llama3_8b": (8, 4), "llama3_70b": (64, 2), "llama3_70b_lora": (16, 2), "gpt_oss_120b": (64, 16), "gpt_oss_120b_lora": (16, 16)}
"""Ranks, and data parallel ranks: two or more, so that a healthy rank holds the parameters of every lost one."""


def compose(name: str, *overrides: str) -> dict[str, Any]:
    hydra = pytest.importorskip("hydra")
    from omegaconf import OmegaConf

    with hydra.initialize_config_dir(str(RECIPES / "config"), version_base="1.3"):
        missing = OmegaConf.missing_keys(hydra.compose(name)) - {override.split("=")[0] for override in overrides}
        assert missing <= GIVEN.keys(), f"{name} leaves {missing - GIVEN.keys()} open"
        config = hydra.compose(name, overrides=[*overrides, *(f"{key}={GIVEN[key]}" for key in sorted(missing))])
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def nodes(value: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping that makes an object."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield path, value
        for key, item in value.items():
            yield from nodes(item, f"{path}.{key}" if path else key)


@pytest.mark.parametrize("name", NAMES)
def test_sizes_fit(name: str) -> None:
    """Also without NeMo: in a world of the recipe's size, on nodes of 8 GPUs."""
    from lightning_gemini.nemo.checks import require_runnable

    parallel = require_runnable(compose(name, "+strategy=gemini_megatron")["trainer"], gpus=8)
    assert (parallel.world, parallel.dp) == WORLDS[name]


@pytest.mark.parametrize("name", NAMES)
def test_one_line_turns_recovery_on(name: str) -> None:
    """The strategy's class and options change; whatever the recipe has given NeMo's strategy stays."""
    plain, gemini = compose(name)["trainer"]["strategy"], compose(name, "+strategy=gemini_megatron")["trainer"]["strategy"]
    assert plain.pop("_target_") == "nemo.lightning.MegatronStrategy"
    assert gemini.pop("_target_") == "lightning_gemini.nemo.GeminiMegatronStrategy"
    assert {key: gemini[key] for key in plain} == plain
    assert gemini["snapshot"]["every_n_steps"] == 1


@pytest.mark.usefixtures("nemo")
@pytest.mark.parametrize("name", NAMES)
def test_as_the_classes_have_it(name: str) -> None:
    """Every `_target_` can be imported and takes the keys that it is given."""
    from hydra.utils import get_object

    for path, node in nodes(compose(name, "+strategy=gemini_megatron")):
        target = node["_target_"]
        made = _object(get_object, target)
        known = inspect.signature(made).parameters
        given = {key for key in node if not key.startswith("_")}
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()) and not dataclasses.is_dataclass(made):
            continue  # checked when it is made
        assert given <= set(known), f"{name}: {path} ({target}) does not take {sorted(given - set(known))}"


def _object(get_object: Any, target: str) -> Any:
    try:
        return get_object(target)
    except Exception:
        if target not in NEWER:
            raise
        return get_object(NEWER[target])


@pytest.mark.usefixtures("nemo")
@pytest.mark.parametrize("name", NAMES)
def test_strategy_and_optimizer_are_made(name: str) -> None:
    import hydra

    config = compose(name, "+strategy=gemini_megatron")
    strategy = hydra.utils.instantiate(config["trainer"]["strategy"])
    optimizer = hydra.utils.instantiate(config["optim"])
    assert type(strategy).__name__ == "GeminiMegatronStrategy"
    assert strategy.tensor_model_parallel_size == config["trainer"]["strategy"]["tensor_model_parallel_size"]
    assert optimizer.config.lr == config["optim"]["config"]["lr"]


BAD = [
    ({"trainer.devices": 7}, "does not divide the world of 7 ranks"),
    ({"trainer.strategy.tensor_model_parallel_size": 16}, "tensor_model_parallel_size=16"),
    ({"trainer.devices": "auto"}, "trainer.devices='auto' is not valid"),
    ({"trainer.devices": 16}, "trainer.devices=16, but this machine has 8 GPUs"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD)
def test_what_does_not_fit_is_one_error(overrides: dict[str, Any], message: str) -> None:
    from lightning_gemini.nemo.checks import require_runnable

    config = compose("llama3_8b", *(f"{key}={value}" for key, value in overrides.items()))
    with pytest.raises(ValueError, match=re.escape(message)):
        require_runnable(config["trainer"], gpus=8)


def test_a_machine_without_gpu(tmp_path: Path) -> None:
    """The script itself: it ends before NeMo is imported."""
    pytest.importorskip("hydra")
    command = [sys.executable, str(RECIPES / "train.py"), "--config-name", "llama3_8b", "data.paths=[x]", f"hydra.run.dir={tmp_path}"]
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path, env=environ)
    assert done.returncode != 0 and "this machine has no GPU" in done.stderr


def test_launch_files_name_recipes_and_their_sizes() -> None:
    """The manifest runs a recipe on as many nodes as it says; the script tells how many each takes."""
    job = yaml.safe_load((RECIPES / "launch" / "jobset.yaml").read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]
    arguments = job["template"]["spec"]["containers"][0]["args"]
    options = dict(argument.removeprefix("--").split("=", 1) for argument in arguments if "=" in argument)
    sizes = compose(options["config-name"])["trainer"]
    assert int(options["nnodes"]) == int(options["trainer.num_nodes"]) == sizes["num_nodes"] == job["completions"] - 1
    assert job["successPolicy"]["rules"][0]["succeededCount"] == sizes["num_nodes"] and options["nproc-per-node"] == str(sizes["devices"])
    assert "+strategy=gemini_megatron" in arguments
    text = (RECIPES / "launch" / "slurm.sbatch").read_text()
    assert f"sbatch --nodes={compose('llama3_70b')['trainer']['num_nodes'] + 1} slurm.sbatch" in text
    for number, names in ((2, ["llama3_8b"]), (3, ["llama3_70b_lora", "gpt_oss_120b_lora"]), (9, ["llama3_70b", "gpt_oss_120b"])):
        assert all(compose(name)["trainer"]["num_nodes"] + 1 == number for name in names)
