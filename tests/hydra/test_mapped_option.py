"""`+data=mmap` on the command line of a script that knows nothing of us: the same bits from loader processes; wrong options end it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from lightning_gemini.config import DataConfig
from tests.rendezvous.test_hydra_option import said, start, trained
from tests.support.campaign import more
from tests.support.pack import same_defaults, same_text


@pytest.mark.parametrize("peers", [["+rendezvous=peer"], *more([])], ids=["with_peers", "alone"])
def test_an_unchanged_script_trains_the_same(tmp_path: Path, peers: list[str]) -> None:
    plain = trained(tmp_path, *peers)
    mapped = trained(tmp_path, "+data=mmap", *peers)
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
    same_defaults("+data=mmap", "mapped_data", DataConfig)


def test_yaml_says_of_each_key_what_the_dataclass_says() -> None:
    same_text("data/mmap.yaml", DataConfig)
