"""The options: what `parse` accepts, and that each refusal names the key, the value and the remedy."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lightning_gemini.config import (
    FAULT_KINDS,
    FAULT_POINTS,
    FaultConfig,
    GeminiConfig,
    MembershipConfig,
    PersistentConfig,
    RecoveryConfig,
    ReplicationConfig,
    SnapshotConfig,
    TelemetryConfig,
    parse,
)
from lightning_gemini.placement import place, recovery_probability

ROOT = Path(__file__).parents[1]

KINDS = [
    SnapshotConfig,
    RecoveryConfig,
    TelemetryConfig,
    ReplicationConfig,
    MembershipConfig,
    PersistentConfig,
    FaultConfig,
    GeminiConfig,
]


def test_nothing_gives_the_defaults() -> None:
    assert parse(GeminiConfig, None) == parse(GeminiConfig, {}) == GeminiConfig()


def test_an_instance_is_returned_as_it_is() -> None:
    config = SnapshotConfig(every_n_steps=3)
    assert parse(SnapshotConfig, config) is config
    assert parse(GeminiConfig, {"snapshot": config}).snapshot is config


@pytest.mark.parametrize("wrap", [dict, OmegaConf.create], ids=["dict", "omegaconf"])
def test_nested_mappings(wrap: Any) -> None:
    value = wrap(
        {
            "snapshot": {"every_n_steps": 2, "background": False},
            "recovery": {"heartbeat_timeout_s": 5},
            "telemetry": {"directory": "events"},
            "replication": {"copies": 3, "when_behind": "wait"},
            "membership": {"user": "train", "lease_ttl_s": 10},
            "persistent": {"url": "s3://bucket/run", "keep_every_n_steps": 100},
            "faults": [{"kind": "kill", "rank": 1, "step": 7}],
        }
    )
    assert parse(GeminiConfig, value) == GeminiConfig(
        snapshot=SnapshotConfig(every_n_steps=2, background=False),
        recovery=RecoveryConfig(heartbeat_timeout_s=5.0),
        telemetry=TelemetryConfig(directory="events"),
        replication=ReplicationConfig(copies=3, when_behind="wait"),
        membership=MembershipConfig(user="train", lease_ttl_s=10),
        persistent=PersistentConfig(url="s3://bucket/run", keep_every_n_steps=100),
        faults=[FaultConfig(kind="kill", rank=1, step=7)],
    )


@pytest.mark.parametrize("wrap", [dict, OmegaConf.create], ids=["dict", "omegaconf"])
def test_a_list_of_texts(wrap: Any) -> None:
    value = wrap({"membership": {"etcd": ["http://a:2379", "https://b"]}})
    assert parse(GeminiConfig, value).membership.etcd == ["http://a:2379", "https://b"]


def test_an_absent_group_is_its_defaults() -> None:
    assert parse(GeminiConfig, {"snapshot": None}).snapshot == SnapshotConfig()


def test_a_whole_number_of_seconds_becomes_a_float() -> None:
    value = parse(RecoveryConfig, {"regroup_timeout_s": 30}).regroup_timeout_s
    assert (type(value), value) == (float, 30.0)


@pytest.mark.parametrize("kind", FAULT_KINDS)
@pytest.mark.parametrize("where", FAULT_POINTS)
def test_every_fault_that_the_schema_names(kind: str, where: str) -> None:
    assert parse(FaultConfig, {"kind": kind, "rank": 0, "step": 0, "where": where}).where == where


def test_defaults_are_not_shared() -> None:
    GeminiConfig().faults.append(FaultConfig(kind="kill", rank=0, step=0))
    assert GeminiConfig().faults == []


@pytest.mark.parametrize("kind", KINDS)
def test_options_are_keyword_only_slotted_and_documented(kind: Any) -> None:
    assert all(field.kw_only for field in dataclasses.fields(kind))
    assert set(kind.__slots__) == {field.name for field in dataclasses.fields(kind)}
    assert kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}(")  # the docstring that dataclasses make up


@pytest.mark.parametrize(
    ("value", "key", "shown", "remedy"),
    [
        ({"snapsot": {}}, "snapsot", "snapsot", "did you mean 'snapshot'"),
        ({"snapshot": {"evry_n_steps": 2}}, "snapshot.evry_n_steps", "evry_n_steps", "did you mean 'every_n_steps'"),
        ({"recovery": {"zzz": 2}}, "recovery.zzz", "zzz", "Known keys are spares, max_faults_per_step"),
        ({"faults": [{"kind": "kill", "rank": 0, "step": 1, "wher": "forward"}]}, "faults[0].wher", "wher", "did you mean 'where'"),
        ({"snapshot": 5}, "snapshot", "5", "give a mapping with the keys every_n_steps"),
        ({"snapshot": {"every_n_steps": "two"}}, "snapshot.every_n_steps", "'two'", "Expected `int`"),
        ({"snapshot": {"every_n_steps": True}}, "snapshot.every_n_steps", "True", "Expected `int`"),
        ({"snapshot": {"every_n_steps": 1.5}}, "snapshot.every_n_steps", "1.5", "Expected `int`"),
        ({"snapshot": {"background": "no"}}, "snapshot.background", "'no'", "Expected `bool`"),
        ({"telemetry": {"directory": 3}}, "telemetry.directory", "3", "Expected `str | null`"),
        ({"faults": "kill"}, "faults", "'kill'", "give a list of faults"),
        ({"faults": [3]}, "faults[0]", "3", "give a mapping with the keys kind, rank, step, where"),
        ({"faults": [{"kind": "kill", "rank": 0}]}, "faults[0]", "step", "known keys are kind, rank, step, where"),
        ({"snapshot": {"every_n_steps": -1}}, "snapshot.every_n_steps", "-1", "0 for none"),
        ({"snapshot": {"chunk_kib": 3}}, "snapshot.chunk_kib", "3", "between 4 and 1048576 KiB"),
        ({"snapshot": {"local_state_mib": 0}}, "snapshot.local_state_mib", "0", "at least 1 MiB"),
        ({"snapshot": {"collective_log_mib": 0}}, "snapshot.collective_log_mib", "0", "at least 1 MiB"),
        ({"recovery": {"spares": -1}}, "recovery.spares", "-1", "0 to 64"),
        ({"recovery": {"spares": 65}}, "recovery.spares", "65", "0 to 64"),
        ({"recovery": {"max_faults_per_step": -1}}, "recovery.max_faults_per_step", "-1", "0 or more"),
        ({"recovery": {"heartbeat_timeout_s": 1}}, "recovery.heartbeat_timeout_s", "1", "2 seconds or more"),
        ({"recovery": {"regroup_timeout_s": 0}}, "recovery.regroup_timeout_s", "0", "a positive number of seconds"),
        ({"recovery": {"collective_timeout_s": -3}}, "recovery.collective_timeout_s", "-3", "a positive number of seconds"),
        ({"replication": {"copies": 0}}, "replication.copies", "0", "1 to 16"),
        ({"replication": {"copies": 17}}, "replication.copies", "17", "1 to 16"),
        ({"replication": {"when_behind": "hurry"}}, "replication.when_behind", "'hurry'", "choose skip or wait"),
        ({"membership": {"etcd": "http://a"}}, "membership.etcd", "'http://a'", "Expected `array`"),
        ({"membership": {"lease_ttl_s": 1}}, "membership.lease_ttl_s", "1", "2 or more"),
        ({"membership": {"lease_ttl_s": 2.5}}, "membership.lease_ttl_s", "2.5", "Expected `int`"),
        ({"membership": {"cert": "c.pem"}}, "membership.cert", "'c.pem'", "give membership.key too"),
        ({"membership": {"key": "k.pem"}}, "membership.cert", "None", "give membership.key too, or neither"),
        ({"membership": {"join_timeout_s": 0}}, "membership.join_timeout_s", "0", "a positive number of seconds"),
        ({"membership": {"vacancy_timeout_s": -1}}, "membership.vacancy_timeout_s", "-1", "a positive number of seconds"),
        ({"membership": {"password": "x"}}, "membership.password", "password", "Known keys are etcd, ca, cert, key, user"),
        ({"persistent": {"every_n_steps": 0}}, "persistent.every_n_steps", "0", "1 or more"),
        ({"persistent": {"keep_last": 0}}, "persistent.keep_last", "0", "1 or more"),
        ({"persistent": {"keep_every_n_steps": 0}}, "persistent.keep_every_n_steps", "0", "or leave it out"),
        ({"persistent": {"resume": ""}}, "persistent.resume", "''", "choose auto, never or a checkpoint's path"),
        ({"persistent": {"every_minutes": 10}}, "persistent.every_minutes", "every_minutes", "did you mean"),
        ({"faults": [{"kind": "kil", "rank": 0, "step": 1}]}, "faults.kind", "'kil'", "choose one of kill, raise"),
        ({"faults": [{"kind": "kill", "rank": 0, "step": 1, "where": "x"}]}, "faults.where", "'x'", "choose one of before_step"),
        ({"faults": [{"kind": "kill", "rank": -1, "step": 1}]}, "faults.rank", "-1", "0 or more"),
        ({"faults": [{"kind": "kill", "rank": 0, "step": -1}]}, "faults.step", "-1", "0 or more"),
    ],
)
@pytest.mark.parametrize("wrap", [dict, OmegaConf.create], ids=["dict", "omegaconf"])
def test_a_refusal_names_key_value_and_remedy(wrap: Any, value: dict[str, Any], key: str, shown: str, remedy: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(GeminiConfig, wrap(value))
    message = str(caught.value)
    assert key in message
    assert shown in message
    assert remedy in message


@pytest.mark.parametrize(
    ("value", "message"), [(3, "GeminiConfig=3 is not valid"), ({"faults": 3}, "faults=3 is not valid"), ([], "GeminiConfig=\\[\\]")]
)
def test_the_root_is_named_where_there_is_no_key(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(GeminiConfig, value)


def test_the_key_of_the_caller_is_the_prefix() -> None:
    with pytest.raises(ValueError, match=r"'trainer\.strategy\.snapshot\.x'"):
        parse(SnapshotConfig, {"x": 1}, "trainer.strategy.snapshot")


def rows(guide: str, pattern: str) -> list[tuple[str, ...]]:
    """Of the tables in a guide."""
    return re.findall(pattern, (ROOT / "docs" / guide).read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    ("guide", "group", "kind"),
    [
        ("nodes.md", "replication", ReplicationConfig),
        ("nodes.md", "membership", MembershipConfig),
        ("storage.md", "persistent", PersistentConfig),
    ],
)
def test_guides_have_every_setting(guide: str, group: str, kind: Any) -> None:
    written = {"": "empty", "None": "null"}
    defaults = {name: written.get(str(value), str(value)) for name, value in dataclasses.asdict(kind()).items()}
    assert dict(rows(guide, rf"^\| `{group}\.(\w+)` \| (\S+) \|")) == defaults


def test_the_guide_has_the_probabilities() -> None:
    found = rows("nodes.md", r"^\| (\d+) \| (.*) \|$")
    assert len(found) == 7
    for nodes, cells in found:
        cases = [(2, 1), (2, 2), (2, 3), (2, 4), (3, 2), (3, 3), (3, 4)]
        assert cells.split(" | ") == [percent(int(nodes), copies, lost) for copies, lost in cases]


def percent(nodes: int, copies: int, lost: int) -> str:
    if copies > nodes or lost > nodes:
        return "–"
    value = 100 * recovery_probability(place([""] * nodes, copies), lost)
    return f"{value:.0f}" if value in (0, 100) else f"{value:.1f}" if value < 99.95 else f"{value:.2f}" if value < 99.995 else "> 99.99"


def test_imports_neither_torch_nor_lightning() -> None:
    """The agent reads its options with this module and must start in milliseconds."""
    package = ROOT / "lightning_gemini"
    code = "import sys, config; assert not {'torch', 'lightning', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env={**os.environ, "PYTHONPATH": str(package)})
