"""The Hydra pack as a user meets it: found by any app, composed over what the project has, wrong settings refused."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_gemini.config import FaultConfig, GeminiConfig, parse

ROOT = Path(__file__).parents[2]

PLAIN = {"train.yaml": "trainer: {devices: 2, strategy: ddp}\n"}
"""As in NeMo's recipes: the strategy is a word in the primary config."""

TEMPLATE = {
    "train.yaml": "defaults: [_self_, {callbacks: default}, {trainer: ddp}]\ntask_name: train\n",
    "trainer/default.yaml": "_target_: lightning.pytorch.trainer.Trainer\nmax_epochs: 10\n",
    "trainer/ddp.yaml": "defaults: [default]\nstrategy: ddp\naccelerator: cpu\ndevices: 2\n",
    "callbacks/default.yaml": "model_summary: {_target_: lightning.pytorch.callbacks.RichModelSummary}\n",
}
"""As in lightning-hydra-template: the word comes from a choice of the group `trainer`, and there are callbacks."""

GROUP = {
    "train.yaml": "defaults: [{strategy: ddp}, _self_]\ntrainer: {devices: 2}\n",
    "strategy/ddp.yaml": "# @package trainer.strategy\n_target_: lightning.pytorch.strategies.DDPStrategy\nstart_method: popen\n",
}
"""A project with a group `strategy` of its own."""


class App:
    """A user's project in a folder, whose config is composed with overrides as on a command line."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, files: dict[str, str]) -> None:
        for name, text in files.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def compose(self, *overrides: str) -> DictConfig:
        with initialize_config_dir(version_base="1.3", config_dir=str(self.root)):
            return compose("train", overrides=list(overrides))


@pytest.fixture
def app(tmp_path: Path) -> Iterator[App]:
    app = App(tmp_path)
    app.write(PLAIN)
    yield app
    GlobalHydra.instance().clear()


def options(strategy: DictConfig) -> GeminiConfig:
    """What the strategy makes of its arguments: plain values, as `instantiate` passes them on with `_convert_: all`."""
    given = OmegaConf.to_container(strategy, resolve=True)
    assert isinstance(given, dict)
    return parse(GeminiConfig, {f.name: given[f.name] for f in dataclasses.fields(GeminiConfig)})


def typed_leaves(value: Any, key: str = "") -> dict[str, tuple[type, Any]]:
    """Every setting by its path, with its type: 1, 1.0 and true are equal to `==`, but not to a reader."""
    if isinstance(value, dict):
        return {k: v for name, item in value.items() for k, v in typed_leaves(item, f"{key}.{name}").items()}
    return {key: (type(value), value)}


@pytest.mark.parametrize(
    ("choice", "own"),
    [
        ("gemini", {"_target_", "_convert_"}),
        ("gemini_fsdp2", {"_target_", "_convert_", "data_parallel_size", "tensor_parallel_size"}),
    ],
)
def test_yaml_equals_dataclasses(app: App, choice: str, own: set[str]) -> None:
    given = OmegaConf.to_container(app.compose(f"+strategy={choice}").trainer.strategy)
    assert isinstance(given, dict)
    settings = {name: item for name, item in given.items() if name not in own}
    assert given.keys() - settings.keys() == own
    assert typed_leaves(settings) == typed_leaves(dataclasses.asdict(GeminiConfig()))


def test_yaml_says_of_each_key_what_the_dataclass_says() -> None:
    """But for line breaks, and for how Python and YAML write nothing, true and false."""
    text = (ROOT / "configs" / "strategy" / "gemini.yaml").read_text()
    for name, kind in get_type_hints(GeminiConfig).items():
        if not dataclasses.is_dataclass(kind):
            continue
        (about, section) = re.findall(rf"^# (.*)\n{name}:\n((?:  .*\n)+)", text, re.MULTILINE)[0]
        commented = {key: words(comment) for comment, key in re.findall(r"((?:  # .*\n)+)  (\w+): ", section)}
        found = re.findall(r'^    (\w+): [^\n]*\n    """(.*?)"""', source(kind), re.DOTALL | re.MULTILINE)
        documented = {field: words(told) for field, told in found}
        assert about == kind.__doc__
        assert list(commented) == list(documented) == [field.name for field in dataclasses.fields(kind)]
        assert commented == documented


def source(kind: Any) -> str:
    return inspect.getsource(kind).replace("None:", "null:").replace("False ", "false ").replace("True ", "true ")


def words(text: str) -> str:
    return " ".join(text.replace("  # ", " ").split())


@pytest.mark.parametrize("project", [PLAIN, TEMPLATE], ids=["plain", "template"])
@pytest.mark.parametrize(
    ("override", "target"),
    [
        ("+strategy=gemini", "GeminiStrategy"),
        ("+strategy=gemini_fsdp2", "GeminiFSDP2Strategy"),
        ("+gemini=default", "GeminiStrategy"),
        ("+gemini=fsdp2", "GeminiFSDP2Strategy"),
    ],
)
def test_replaces_the_strategy_of_a_project(app: App, project: dict[str, str], override: str, target: str) -> None:
    app.write(project)
    before, cfg = app.compose(), app.compose(override)
    assert before.trainer.strategy == "ddp"
    assert cfg.trainer.strategy._target_ == f"lightning_gemini.{target}"
    assert options(cfg.trainer.strategy) == GeminiConfig()
    assert {k: v for k, v in cfg.trainer.items() if k != "strategy"} == {k: v for k, v in before.trainer.items() if k != "strategy"}


def test_works_in_a_project_without_trainer(app: App) -> None:
    app.write({"train.yaml": "seed: 1\n"})
    assert options(app.compose("+strategy=gemini").trainer.strategy) == GeminiConfig()


def test_joins_a_group_the_project_has(app: App) -> None:
    app.write(GROUP)
    replaced = app.compose("strategy=gemini").trainer.strategy
    assert replaced._target_ == "lightning_gemini.GeminiStrategy"
    assert "start_method" not in replaced
    # `+` would merge the two classes' options: Hydra refuses it and says what to write instead.
    with pytest.raises(ConfigCompositionException, match="Multiple values for strategy"):
        app.compose("+strategy=gemini")


def test_file_of_the_user_wins(app: App) -> None:
    app.write({"strategy/gemini.yaml": "# @package trainer.strategy\n_target_: mine.Strategy\n"})
    assert app.compose("+strategy=gemini").trainer.strategy == {"_target_": "mine.Strategy"}


def test_adds_the_callback_and_keeps_the_users(app: App) -> None:
    app.write(TEMPLATE)
    callbacks = app.compose("+gemini=default").callbacks
    assert list(callbacks) == ["model_summary", "gemini"]
    assert callbacks.gemini == {"_target_": "lightning_gemini.GeminiCallback"}
    assert list(app.compose("+strategy=gemini").callbacks) == ["model_summary"]


def test_settings_are_overridden(app: App) -> None:
    got = options(
        app.compose("+strategy=gemini", "trainer.strategy.snapshot.every_n_steps=2", "trainer.strategy.recovery.spares=0").trainer.strategy
    )
    want = GeminiConfig()
    want.snapshot.every_n_steps, want.recovery.spares = 2, 0
    assert got == want


SETTINGS = {
    "replication.copies": 3,
    "replication.when_behind": "wait",
    "membership.etcd": ["http://10.0.0.1:2379", "https://etcd1.example.com"],
    "membership.ca": "/etc/ca.pem",
    "membership.user": "train",
    "membership.lease_ttl_s": 7,
    "membership.join_timeout_s": 30.5,
    "membership.vacancy_timeout_s": 40.0,
    "persistent.url": "s3://bucket/run-7",
    "persistent.every_n_steps": 50,
    "persistent.keep_last": 4,
    "persistent.keep_every_n_steps": 1000,
    "persistent.resume": "never",
}


@pytest.mark.parametrize("choice", ["+strategy=gemini", "+strategy=gemini_fsdp2", "+gemini=default", "+gemini=fsdp2"])
def test_settings_of_several_nodes(app: App, choice: str) -> None:
    given = [f"trainer.strategy.{key}={str(value).replace(chr(39), '')}" for key, value in SETTINGS.items()]
    certificate = ["trainer.strategy.membership.cert=/c.pem", "trainer.strategy.membership.key=/k.pem"]  # neither is valid alone
    got = options(app.compose(choice, *given, *certificate).trainer.strategy)
    for key, value in SETTINGS.items():
        group, name = key.split(".")
        assert getattr(getattr(got, group), name) == value
    assert (got.membership.cert, got.membership.key) == ("/c.pem", "/k.pem")
    covered = {*SETTINGS, "membership.cert", "membership.key"}
    groups = ("replication", "membership", "persistent")
    assert covered == {f"{group}.{name}" for group in groups for name in dataclasses.asdict(getattr(got, group))}


def test_settings_in_the_users_file(app: App) -> None:
    app.write({"train.yaml": "defaults: [{strategy: gemini}, _self_]\ntrainer: {strategy: {snapshot: {every_n_steps: 4}}}\n"})
    assert options(app.compose().trainer.strategy).snapshot.every_n_steps == 4


@pytest.mark.parametrize(
    ("preset", "fault"),
    [
        ("kill_rank", FaultConfig(kind="kill", rank=1, step=5, where="backward")),
        ("raise", FaultConfig(kind="raise", rank=1, step=5, where="forward")),
    ],
)
def test_drills(app: App, preset: str, fault: FaultConfig) -> None:
    assert options(app.compose("+strategy=gemini", f"+faults={preset}").trainer.strategy).faults == [fault]
    moved = app.compose("+gemini=default", f"+faults={preset}", "trainer.strategy.faults.0.rank=0").trainer.strategy
    assert options(moved).faults == [dataclasses.replace(fault, rank=0)]


def test_every_preset_in_the_pack_is_tested_and_parses(app: App) -> None:
    presets = sorted(p.stem for p in (ROOT / "configs" / "faults").glob("*.yaml"))
    assert presets == ["kill_rank", "raise"]


def test_fault_given_on_the_command_line(app: App) -> None:
    strategy = app.compose("+strategy=gemini", "trainer.strategy.faults=[{kind:stop,rank:0,step:3}]").trainer.strategy
    assert options(strategy).faults == [FaultConfig(kind="stop", rank=0, step=3)]


def test_mistyped_override_is_refused_by_hydra(app: App) -> None:
    with pytest.raises(ConfigCompositionException) as caught:
        app.compose("+strategy=gemini", "trainer.strategy.snapshot.evry_n_steps=2")
    assert "evry_n_steps" in str(caught.value) + str(caught.value.__cause__)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+trainer.strategy.snapshot.evry_n_steps=2", r"snapshot\.evry_n_steps.*did you mean 'every_n_steps'"),
        ("trainer.strategy.snapshot.every_n_steps=two", r"snapshot\.every_n_steps='two' is not valid: Expected `int`, got `str`"),
        ("trainer.strategy.snapshot.every_n_steps=-1", r"snapshot\.every_n_steps=-1 is not valid: .*or 0 for none"),
        ("+trainer.strategy.replication.copys=2", r"replication\.copys.*did you mean 'copies'"),
        ("trainer.strategy.replication.when_behind=hurry", r"replication\.when_behind='hurry' is not valid: choose skip or wait"),
        ("trainer.strategy.membership.etcd=[etcd:2379]", r"membership\.etcd='etcd:2379' is not valid: give URLs"),
        ("trainer.strategy.membership.cert=/c.pem", r"membership\.cert='/c.pem' is not valid: give membership\.key too"),
        ("trainer.strategy.persistent.every_n_steps=0", r"persistent\.every_n_steps=0 is not valid: .*1 or more"),
        ("trainer.strategy.snapshot=2", r"snapshot=2 is not valid: give a mapping"),
        ("trainer.strategy.faults=[{kind:kil,rank:0,step:1}]", r"faults.*kind='kil' is not valid: choose one of kill"),
    ],
)
def test_what_gets_past_hydra_is_refused_when_instantiated(app: App, override: str, message: str) -> None:
    strategy = app.compose("+strategy=gemini", override).trainer.strategy
    with pytest.raises(ValueError, match=message):
        options(strategy)
    with pytest.raises(InstantiationException, match=message):
        instantiate(strategy)


def test_typo_in_the_users_file_is_refused_when_instantiated(app: App) -> None:
    app.write({"train.yaml": "defaults: [{strategy: gemini}, _self_]\ntrainer: {strategy: {recovery: {spars: 2}}}\n"})
    with pytest.raises(InstantiationException, match=r"recovery\.spars.*did you mean 'spares'"):
        instantiate(app.compose().trainer.strategy)


@pytest.mark.parametrize("convert", ["partial", "object", "all"])
def test_instantiates_the_strategy(app: App, convert: str) -> None:
    from lightning_gemini import GeminiStrategy

    cfg = app.compose("+strategy=gemini", f"trainer.strategy._convert_={convert}", "+faults=kill_rank")
    assert isinstance(instantiate(cfg.trainer.strategy), GeminiStrategy)


def test_instantiates_the_fsdp2_strategy(app: App) -> None:
    from lightning_gemini import GeminiFSDP2Strategy

    assert isinstance(instantiate(app.compose("+strategy=gemini_fsdp2").trainer.strategy), GeminiFSDP2Strategy)


def test_instantiates_the_callback(app: App) -> None:
    from lightning_gemini import GeminiCallback

    assert isinstance(instantiate(app.compose("+gemini=default").callbacks.gemini), GeminiCallback)


def test_options_of_ddp_reach_the_strategy(app: App) -> None:
    strategy = instantiate(app.compose("+strategy=gemini", "+trainer.strategy.find_unused_parameters=true").trainer.strategy)
    assert strategy._ddp_kwargs["find_unused_parameters"] is True


def test_other_apps_pay_nothing(app: App) -> None:
    """The plugin runs in every Hydra app of the machine: composing there must not import torch, nor us."""
    code = (
        "import sys\n"
        "from hydra import compose, initialize_config_dir\n"
        f"with initialize_config_dir(version_base='1.3', config_dir={str(app.root)!r}):\n"
        "    assert compose('train', overrides=['+strategy=gemini']).trainer.strategy.snapshot.every_n_steps == 1\n"
        "loaded = {'torch', 'lightning', 'lightning_gemini', 'msgspec'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # Hydra warns about a plugin that it cannot import


@pytest.mark.parametrize("shipped", [True, False], ids=["wheel", "without_pack"])
def test_directory_in_an_installed_package(tmp_path: Path, shipped: bool) -> None:
    """In a wheel the pack lies inside the package, which must be found without running it; where there is none, nothing is added."""
    package = tmp_path / "lightning_gemini"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('was imported')\n")
    if shipped:
        shutil.copytree(ROOT / "configs", package / "configs")
    code = "from hydra_plugins.lightning_gemini_plugin.searchpath import config_directory; print(config_directory())"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env, cwd=tmp_path, check=True)
    assert done.stdout.strip() == (str(package / "configs") if shipped else "None")
