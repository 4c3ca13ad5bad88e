"""`+recovery=…`: the four steps of adoption, each one option, over projects of any shape; NeMo's list of allowed classes."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from hydra_plugins.lightning_gemini_plugin.searchpath import allow_in_nemo
from tests.hydra.test_config_pack import GROUP, PLAIN, TEMPLATE, App

PROJECTS = {"plain": PLAIN, "template": TEMPLATE, "group": GROUP, "group data": PLAIN | {"data/own.yaml": "path: here\n"}}
STRATEGY = "lightning_gemini.GeminiStrategy"


@pytest.fixture(params=PROJECTS)
def app(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[App]:
    app = App(tmp_path)
    app.write(PROJECTS[request.param])
    yield app
    GlobalHydra.instance().clear()


@pytest.mark.parametrize(
    ("step", "rendezvous", "data", "every"),
    [("rendezvous", True, False, None), ("data", True, True, None), ("in_process", False, True, 0), ("gemini", False, True, 1)],
)
def test_each_step_is_one_option(app: App, step: str, rendezvous: bool, data: bool, every: int | None) -> None:
    before = app.compose()
    config = app.compose(f"+recovery={step}")
    assert ("rendezvous" in config, "mapped_data" in config) == (rendezvous, data)
    if every is None:
        assert config.trainer == before.trainer
    else:
        assert config.trainer.strategy._target_ == STRATEGY and config.trainer.strategy.snapshot.every_n_steps == every
        assert {key: config.trainer[key] for key in before.trainer if key != "strategy"} == {
            key: before.trainer[key] for key in before.trainer if key != "strategy"
        }


def test_options_are_given_as_ever(app: App) -> None:
    config = app.compose("+recovery=gemini", "trainer.strategy.recovery.spares=2", "mapped_data.prefetch_length=3")
    assert config.trainer.strategy.recovery.spares == 2 and config.mapped_data.prefetch_length == 3


@pytest.fixture
def nemo(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """As much of NeMo 3 as the plugin touches; tests/nemo has the real one."""
    module = types.ModuleType("nemo.core.classes.common")
    module.ALLOWED_TARGET_PREFIXES = ["nemo.core."]  # type: ignore[attr-defined]
    module.ALLOWED_EXACT_CLASS_TARGETS = set()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_nemo_s_list_gets_our_classes_and_nothing_else(nemo: types.ModuleType) -> None:
    for _ in range(2):
        allow_in_nemo()
    names = {"lightning_gemini.GeminiStrategy", "lightning_gemini.GeminiFSDP2Strategy", "lightning_gemini.GeminiCallback"}
    assert names == nemo.ALLOWED_EXACT_CLASS_TARGETS
    assert sorted(nemo.ALLOWED_TARGET_PREFIXES) == sorted(["nemo.core.", *names])


def test_a_nemo_without_such_a_list_is_left_alone(nemo: types.ModuleType) -> None:
    del nemo.ALLOWED_TARGET_PREFIXES
    allow_in_nemo()
    assert set() == nemo.ALLOWED_EXACT_CLASS_TARGETS
