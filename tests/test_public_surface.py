"""What users write against, as literal tables. A change here is a change of the interface: say so in the CHANGELOG."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, StrategyRegistry

import lightning_gemini
from lightning_gemini import config
from lightning_gemini.data.position import PositionedLoader

PUBLIC = [
    "DataConfig",
    "FaultConfig",
    "GeminiCallback",
    "GeminiConfig",
    "GeminiFSDP2Strategy",
    "GeminiStrategy",
    "MMapDataModule",
    "MembershipConfig",
    "PersistentConfig",
    "RecoveryConfig",
    "RendezvousConfig",
    "ReplicationConfig",
    "SnapshotConfig",
    "TelemetryConfig",
    "__version__",
    "init_process_group",
    "use_mapped_data",
    "use_peer_rendezvous",
]
REQUIRED = "(required)"
OPTIONS: dict[str, dict[str, tuple[str, Any]]] = {
    "SnapshotConfig": {
        "every_n_steps": ("int", 1),
        "background": ("bool", True),
        "chunk_kib": ("int", 1024),
        "local_state_mib": ("int", 64),
        "collective_log_mib": ("int", 32),
    },
    "RecoveryConfig": {
        "spares": ("int", 1),
        "max_faults_per_step": ("int", 3),
        "heartbeat_timeout_s": ("float", 60.0),
        "regroup_timeout_s": ("float", 600.0),
        "collective_timeout_s": ("float", 1800.0),
    },
    "TelemetryConfig": {
        "directory": ("str | None", None),
        "log_to_logger": ("bool", True),
        "banner": ("bool", True),
    },
    "RendezvousConfig": {
        "hosts": ("list[str] | None", None),
        "port": ("int | None", None),
        "job": ("str | None", None),
        "timeout_s": ("float", 600.0),
        "token_file": ("str | None", None),
        "etcd": ("str | None", None),
    },
    "DataConfig": {
        "prefetch_length": ("int", 10),
        "lookback_length": ("int", 2),
        "directory": ("str | None", None),
        "size_limit_mib": ("int", 2048),
        "encryption": ("bool", False),
        "share": ("bool", True),
        "setup_ahead": ("bool", False),
    },
    "ReplicationConfig": {
        "copies": ("int", 2),
        "when_behind": ("str", "skip"),
    },
    "MembershipConfig": {
        "etcd": ("list[str]", []),
        "ca": ("str | None", None),
        "cert": ("str | None", None),
        "key": ("str | None", None),
        "user": ("str | None", None),
        "lease_ttl_s": ("int", 4),
        "join_timeout_s": ("float", 600.0),
        "vacancy_timeout_s": ("float", 3600.0),
    },
    "PersistentConfig": {
        "url": ("str", ""),
        "every_n_steps": ("int", 1000),
        "keep_last": ("int", 2),
        "keep_every_n_steps": ("int | None", None),
        "resume": ("str", "auto"),
    },
    "FaultConfig": {
        "kind": ("str", REQUIRED),
        "rank": ("int", REQUIRED),
        "step": ("int", REQUIRED),
        "where": ("str", "forward"),
    },
    "GeminiConfig": {
        "snapshot": ("SnapshotConfig", config.SnapshotConfig()),
        "recovery": ("RecoveryConfig", config.RecoveryConfig()),
        "telemetry": ("TelemetryConfig", config.TelemetryConfig()),
        "replication": ("ReplicationConfig", config.ReplicationConfig()),
        "membership": ("MembershipConfig", config.MembershipConfig()),
        "persistent": ("PersistentConfig", config.PersistentConfig()),
        "faults": ("list[FaultConfig]", []),
    },
}
SIGNATURES = {
    "GeminiStrategy": [*(f"*{name}=None" for name in OPTIONS["GeminiConfig"]), "**kwargs"],
    "GeminiFSDP2Strategy": [*(f"*{name}=None" for name in OPTIONS["GeminiConfig"]), "**kwargs"],
    "GeminiCallback": [],
    "SnapshotConfig": [f"*{name}" for name in OPTIONS["SnapshotConfig"]],
    "RecoveryConfig": [f"*{name}" for name in OPTIONS["RecoveryConfig"]],
    "RendezvousConfig": [f"*{name}" for name in OPTIONS["RendezvousConfig"]],
    "TelemetryConfig": [f"*{name}" for name in OPTIONS["TelemetryConfig"]],
    "DataConfig": [f"*{name}" for name in OPTIONS["DataConfig"]],
    "ReplicationConfig": [f"*{name}" for name in OPTIONS["ReplicationConfig"]],
    "MembershipConfig": [f"*{name}" for name in OPTIONS["MembershipConfig"]],
    "PersistentConfig": [f"*{name}" for name in OPTIONS["PersistentConfig"]],
    "FaultConfig": [f"*{name}" for name in OPTIONS["FaultConfig"]],
    "GeminiConfig": [f"*{name}" for name in OPTIONS["GeminiConfig"]],
}
FAULTS = ("kill", "raise", "stop", "exit", "segv")
PLACES = ("before_step", "forward", "backward", "optimizer", "after_step", "validation", "callback")


def test_public_names() -> None:
    assert sorted(lightning_gemini.__all__) == sorted(PUBLIC)
    assert all(getattr(lightning_gemini, name) is not None for name in PUBLIC)
    with pytest.raises(AttributeError, match="no attribute 'Gemini'"):
        _ = lightning_gemini.Gemini


def test_a_star_import_gives_them() -> None:
    names: dict[str, Any] = {}
    exec("from lightning_gemini import *", names)
    assert set(PUBLIC) <= set(names)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    def shown(parameter: inspect.Parameter) -> str:
        if parameter.kind is parameter.VAR_KEYWORD:
            return f"**{parameter.name}"
        assert parameter.kind is parameter.KEYWORD_ONLY, f"{parameter} is not keyword-only"
        default = "" if name.endswith("Config") or parameter.default is parameter.empty else f"={parameter.default}"
        return f"*{parameter.name}{default}"

    assert [shown(p) for p in inspect.signature(getattr(lightning_gemini, name)).parameters.values()] == SIGNATURES[name]


@pytest.mark.parametrize("name", OPTIONS)
def test_options_and_defaults(name: str) -> None:
    found = {}
    for field in dataclasses.fields(getattr(lightning_gemini, name)):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        found[field.name] = (field.type, REQUIRED if default is dataclasses.MISSING else default)
    assert found == OPTIONS[name]


def test_fault_kinds_and_places() -> None:
    assert (config.FAULT_KINDS, config.FAULT_POINTS) == (FAULTS, PLACES)


@pytest.mark.parametrize(
    ("name", "cls", "base"),
    [("gemini", "GeminiStrategy", DDPStrategy), ("gemini_fsdp2", "GeminiFSDP2Strategy", ModelParallelStrategy)],
)
def test_registered_strategies(name: str, cls: str, base: type) -> None:
    found = StrategyRegistry.get(name)
    assert type(found) is getattr(lightning_gemini, cls) and isinstance(found, base)
    assert found.strategy_name == name
    assert StrategyRegistry[name]["description"]
    trainer = pl.Trainer(strategy=name, devices=2, accelerator="cpu", logger=False, enable_checkpointing=False)
    assert type(trainer.strategy) is getattr(lightning_gemini, cls)


def test_options_reach_the_strategy() -> None:
    faults = [{"kind": "kill", "rank": 0, "step": 1}]
    groups = {"snapshot": {"every_n_steps": 4}, "recovery": {"spares": 2}, "telemetry": {"banner": False}}
    strategy = lightning_gemini.GeminiStrategy(**groups, faults=faults)
    assert strategy.config == lightning_gemini.GeminiConfig(
        snapshot=config.SnapshotConfig(every_n_steps=4),
        recovery=config.RecoveryConfig(spares=2),
        telemetry=config.TelemetryConfig(banner=False),
        faults=[config.FaultConfig(kind="kill", rank=0, step=1)],
    )


def test_a_typing_error_in_an_argument_is_found() -> None:
    with pytest.raises(ValueError, match="unknown key 'snapshots'"):
        lightning_gemini.GeminiStrategy(snapshots={})


def test_the_version_is_the_distribution_s() -> None:
    assert lightning_gemini.__version__.count(".") == 2


def test_the_loader_shows_the_user_s_attributes() -> None:
    assert PositionedLoader([1, 2]).__len__() == 2
