"""Imports point one way. Read from the sources, so that a lazy import inside a function counts as well."""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_gemini"
NAME = "lightning_gemini"
MODULES = {
    ".".join([NAME, *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if "__pycache__" not in path.parts
}


def _for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def _imports(node: ast.AST, module: str, lazy: bool) -> set[str]:
    """Modules imported below `node`; with `lazy` also in functions."""
    found: set[str] = set()
    for child in ast.iter_child_nodes(node):
        if _for_types_only(child) or (not lazy and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            continue
        if isinstance(child, ast.Import):
            found |= {alias.name for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            assert not child.level and child.module, f"{module}: imports are absolute here"
            submodules = {f"{child.module}.{alias.name}" for alias in child.names}
            found |= submodules & MODULES.keys() or {child.module}
        found |= _imports(child, module, lazy)
    return found


@cache
def imports(module: str, lazy: bool = True) -> frozenset[str]:
    """What a module imports itself, whether of ours or of others."""
    return frozenset(_imports(ast.parse(MODULES[module].read_text()), module, lazy))


@cache
def reaches(module: str) -> frozenset[str]:
    """Everything that importing `module` loads, packages on the way included; the root's own imports are for users, not for the agent."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        current = waiting.pop()
        parts = current.split(".")
        parents = {".".join(parts[:i]) for i in range(2, len(parts))} if parts[0] == NAME else set()
        new = (parents | (imports(current, False) if current in MODULES and current != NAME else set())) - found
        found |= new
        waiting += new
    return frozenset(found)


def inside(package: str) -> list[str]:
    prefix = f"{NAME}.{package}"
    return sorted(name for name in MODULES if name == prefix or name.startswith(f"{prefix}."))


def top(name: str) -> str:
    return name.partition(".")[0]


_RANKS = ["strategy", "hooks", "callback", "launcher", "environment", "faults", "checks", "compat", "data", "mapped"]
"""What only ranks load."""

# package -> what it must not import, itself, in any function
FORBIDDEN = {
    "config": ["agent", "recovery", "rendezvous", "snapshot", "state", "strategy", "hooks", "callback", "compat", "data"],
    "telemetry.events": [
        "agent",
        "recovery",
        "rendezvous",
        "snapshot",
        "state",
        "strategy",
        "hooks",
        "callback",
        "compat",
        "data",
        "config",
    ],
    "snapshot": ["recovery", "agent", "strategy", "hooks", "callback", "launcher", "compat", "data", "config"],
    "state": [
        "recovery",
        "agent",
        "snapshot.arena",
        "snapshot.blocks",
        "snapshot.collective_log",
        "snapshot.cuda",
        "rendezvous",
        "peers",
        "strategy",
        "hooks",
        "callback",
        "launcher",
        "config",
    ],
    "data": ["recovery", "agent", "snapshot", "rendezvous", "strategy", "hooks", "callback", "launcher", "compat", "config"],
    "mapped": ["recovery", "agent", "snapshot", "rendezvous", "peers", "strategy", "hooks", "callback", "launcher", "datasets"],
    "datasets": [
        "recovery",
        "agent",
        "snapshot",
        "state",
        "rendezvous",
        "peers",
        "strategy",
        "hooks",
        "callback",
        "launcher",
        "compat",
        "data",
        "mapped",
        "config",
    ],
    "peers": ["recovery", "agent", "snapshot", "state", "rendezvous", "strategy", "hooks", "callback", "launcher", "compat", "data"],
    "rendezvous": ["recovery", "strategy", "hooks", "callback", "launcher", "compat", "data"],
    "recovery": ["strategy", "hooks", "callback", "launcher", "environment", "faults", "checks"],
    "recovery.plan": ["agent", "snapshot", "state", "rendezvous", "compat", "config"],
    "agent": ["strategy", "hooks", "callback", "launcher", "environment", "faults", "checks", "compat", "state", "rendezvous", "data"],
    "membership": [*_RANKS, "agent", "replication", "storage", "state", "snapshot", "rendezvous", "placement"],
    "replication": [*_RANKS, "agent", "storage", "state", "rendezvous", "placement", "recovery", "config"],
    "storage": ["agent.supervisor", "agent.node", "recovery", "rendezvous", "membership", "replication", "strategy", "hooks", "launcher"],
    "placement": ["agent", "recovery", "membership", "replication", "config"],
    "compat": ["agent", "recovery", "rendezvous", "snapshot", "state", "strategy", "hooks", "callback", "data", "config"],
}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_one_way(package: str) -> None:
    assert inside(package), f"{package} has gone: update the table"
    for module in inside(package):
        for other in FORBIDDEN[package]:
            wrong = imports(module) & set(inside(other))
            assert not wrong, f"{module} imports {wrong}"


LIGHT = [
    *(module for package in ("agent", "peers", "membership", "replication", "placement", "memory_size") for module in inside(package)),
    *(f"{NAME}.{module}" for module in ("config", "telemetry.events", "recovery.plan", "storage.process", "storage.messages")),
]


@pytest.mark.parametrize("module", LIGHT)
def test_the_agent_never_loads_torch(module: str) -> None:
    heavy = {"torch", "lightning", "torchmetrics", "numpy", "hydra", "omegaconf"}
    assert not {name for name in reaches(module) if top(name) in heavy}
    allowed = {NAME, "msgspec", "xxhash", "psutil"} | set(sys.stdlib_module_names)
    assert {top(name) for name in reaches(module)} <= allowed


def test_the_decision_is_pure() -> None:
    assert {top(name) for name in imports(f"{NAME}.recovery.plan")} <= {"__future__", "collections", "dataclasses", "typing"}


@pytest.mark.parametrize("module", inside("compat"))
def test_compat_knows_only_its_hosts(module: str) -> None:
    hosts = {"megatron"} if module == f"{NAME}.compat.megatron" else {"lightning", "torch"}
    assert {top(name) for name in imports(module)} - set(sys.stdlib_module_names) <= hosts


def test_no_module_loads_itself() -> None:
    for module in sorted(MODULES):
        if module != NAME:
            assert module not in reaches(module), f"{module} is in a circle of imports"


def test_only_declared_dependencies() -> None:
    declared = {"torch", "lightning", "hydra", "omegaconf", "msgspec", "xxhash", "psutil", "numpy", "fsspec"}
    declared |= {"torchmetrics"}  # comes with lightning
    declared |= {"etcd3gw"}  # the extra `etcd`, imported when rendezvous.etcd is set
    declared |= {"cryptography"}  # the extra `encryption`, imported when mapped_data.encryption is set
    declared |= {"pyarrow", "tokenizers"}  # the extra `data`, imported by the data modules that need them
    megatron = {"nemo", "megatron"}  # the extra `nemo-llm`, in these only, which are imported when its strategy is asked for
    for module in sorted(MODULES):
        others = {top(name) for name in imports(module)} - set(sys.stdlib_module_names) - {NAME}
        others -= megatron if module.startswith((f"{NAME}.nemo.", f"{NAME}.compat.megatron")) else set()
        assert others <= declared, f"{module} imports {others - declared}"


def test_the_tables_of_this_file_see_what_is_there() -> None:
    """A reader that found nothing would pass everything above."""
    assert "torch" in {top(name) for name in reaches(f"{NAME}.strategy")}
    assert f"{NAME}.recovery.engine" in imports(f"{NAME}.hooks.base")
    assert f"{NAME}.hooks.base" in imports(f"{NAME}.callback"), "lazy imports are seen"
    assert f"{NAME}.hooks.base" not in imports(f"{NAME}.callback", False)
