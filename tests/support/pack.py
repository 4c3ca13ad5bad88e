"""A file of the config pack says what the dataclass behind it says."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[2]


def same_defaults(override: str, key: str, kind: type) -> None:
    """What `override` puts under `key` are the defaults of `kind`, in value and in type."""
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "tests" / "support" / "scripts" / "conf")):
        config = OmegaConf.to_container(compose("plain", overrides=[override])[key])
    GlobalHydra.instance().clear()
    defaults = dataclasses.asdict(kind())
    assert config == defaults
    assert isinstance(config, dict) and [type(config[name]) for name in defaults] == [type(value) for value in defaults.values()]


def same_text(file: str, kind: type) -> None:
    """The docstring under a field and the comment over a key are one text, but for how "nothing" is written."""
    documented = dict(re.findall(r'^    (\w+): .*\n    """(.*)"""$', inspect.getsource(kind), re.MULTILINE))
    assert list(documented) == list(dataclasses.asdict(kind()))
    text = (ROOT / "configs" / file).read_text()
    commented = {key: comment for comment, key in re.findall(r"^  # (.*)\n  (\w+): ", text, re.MULTILINE)}
    assert commented == {key: comment.replace("None:", "null:") for key, comment in documented.items()}
