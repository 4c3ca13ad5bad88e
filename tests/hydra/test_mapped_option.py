"""`+data=mmap` on the command line of a script that knows nothing of us: the same bits from loader processes; wrong options end it."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import lightning_gemini.config
from lightning_gemini.config import DataConfig
from tests.rendezvous.test_hydra_option import ROOT, said, start, trained

TEXT = (ROOT / "configs" / "data" / "mmap.yaml").read_text()


@pytest.mark.parametrize("more", [[], ["+rendezvous=peer"]], ids=["alone", "with_peers"])
def test_an_unchanged_script_trains_the_same(tmp_path: Path, more: list[str]) -> None:
    plain = trained(tmp_path, *more)
    mapped = trained(tmp_path, "+data=mmap", *more)
    assert [record["losses"] for record in mapped] == [record["losses"] for record in plain]
    assert [record["loader"] for record in plain + mapped] == ["DataLoader"] * 2 + ["MappedLoader"] * 2


def test_in_a_project_with_a_group_of_that_name(tmp_path: Path) -> None:
    """Hydra would take it for another choice of the project's own group."""
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "train.yaml").write_text("defaults: [_self_, {data: own}]\n")
    (tmp_path / "conf" / "data" / "own.yaml").write_text("path: here\n")
    with initialize_config_dir(version_base="1.3", config_dir=str(tmp_path / "conf")):
        config = compose("train", overrides=["+data@_global_=mmap", "mapped_data.prefetch_length=3"])
    GlobalHydra.instance().clear()
    assert config.data == {"path": "here"} and config.mapped_data.prefetch_length == 3


WRONG = {
    "mapped_data.prefetch_length=0": "mapped_data.prefetch_length=0 is not valid: give a number of batches, 1 to 256",
    "mapped_data.directory=/proc/nothing": "mapped_data.directory='/proc/nothing' cannot be made",
    "+mapped_data.prefetch=1": "unknown key 'mapped_data.prefetch': did you mean 'prefetch_length'? Known keys are prefetch_length,",
}


def test_a_wrong_option_is_one_line_and_no_training(tmp_path: Path) -> None:
    commands = {override: start(tmp_path, "+data=mmap", override) for override in WRONG}
    texts = {override: said(command) for override, command in commands.items()}
    for override, message in WRONG.items():
        assert commands[override].returncode == 1
        (line,) = texts[override].strip().splitlines()
        assert line.startswith(f"lightning_gemini: {message}")
    assert not list(tmp_path.glob("rank*.json"))


def test_yaml_equals_the_dataclass() -> None:
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "tests" / "support" / "scripts" / "conf")):
        config = OmegaConf.to_container(compose("plain", overrides=["+data=mmap"]).mapped_data)
    GlobalHydra.instance().clear()
    defaults = dataclasses.asdict(DataConfig())
    assert config == defaults
    assert isinstance(config, dict) and [type(config[key]) for key in defaults] == [type(value) for value in defaults.values()]


def test_yaml_says_of_each_key_what_the_dataclass_says() -> None:
    """The docstring under a field and the comment over a key are one text, but for how "nothing" is written."""
    source = inspect.getsource(lightning_gemini.config.DataConfig)
    documented = dict(re.findall(r'^    (\w+): .*\n    """(.*)"""$', source, re.MULTILINE))
    assert list(documented) == list(dataclasses.asdict(DataConfig()))
    commented = {key: text for text, key in re.findall(r"^  # (.*)\n  (\w+): ", TEXT, re.MULTILINE)}
    assert commented == {key: text.replace("None:", "null:") for key, text in documented.items()}
