"""Puts the config pack on the search path of every Hydra app, so that `+strategy=gemini` works in a project that never heard of it.

Every Hydra app on the machine imports this module, most of which never train with us. So it imports hydra and the standard library
only, does not import `lightning_gemini` (which imports torch), and where the pack is not found it adds nothing rather than fail.

There is deliberately no ConfigStore schema. Hydra makes a composed config strict by itself: an override of a key that the YAML lacks is
an error. What gets past that (a `+` override, a key in the user's own file, a wrong type) is refused by `lightning_gemini.config.parse`
when the strategy is instantiated, before any process starts. A schema would tie the user's config to classes loaded here under a makeshift
module name, and launchers and checkpoints pickle configs together with their classes.

NeMo 3 instantiates only classes of an allow-list of its own (`nemo.core.classes.common`), which foreign strategies and callbacks cannot be
on. In a NeMo script ours are put there, by their full names and nothing else; where NeMo is not imported yet, or has no such list, nothing
is done, and `trainer.strategy=gemini`, the registered name, works without.

`import lightning_gemini` registers that name; for a script that never does, it is registered here, and the import waits for a Trainer that
asks for it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

_STRATEGIES = {"gemini": "GeminiStrategy", "gemini_fsdp2": "GeminiFSDP2Strategy"}
_CLASSES = tuple(f"lightning_gemini.{name}" for name in (*_STRATEGIES.values(), "GeminiCallback"))


class LightningGeminiSearchPath(SearchPathPlugin):
    """Appends our `configs` directory: after the user's own, whose files of the same name therefore win."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        allow_in_nemo()
        know_the_names()
        directory = config_directory()
        if directory is not None:
            search_path.append(provider="lightning-gemini", path=f"file://{directory}")


def allow_in_nemo() -> None:
    """Let NeMo 3 instantiate our classes, if this process has imported it."""
    nemo = sys.modules.get("nemo.core.classes.common")
    prefixes, exact = getattr(nemo, "ALLOWED_TARGET_PREFIXES", None), getattr(nemo, "ALLOWED_EXACT_CLASS_TARGETS", None)
    if isinstance(prefixes, list) and isinstance(exact, set):
        prefixes += [name for name in _CLASSES if name not in prefixes]
        exact.update(_CLASSES)


def know_the_names() -> None:
    """Let a Trainer of this process know our strategies by name, if it has imported Lightning."""
    registry = getattr(sys.modules.get("lightning.pytorch.strategies"), "StrategyRegistry", None)
    if isinstance(registry, dict):
        for name, cls in _STRATEGIES.items():
            if name not in registry:
                registry.register(name, functools.partial(_strategy, cls))  # type: ignore[attr-defined]


def _strategy(cls: str, **options: Any) -> Any:
    return getattr(importlib.import_module("lightning_gemini"), cls)(**options)


def config_directory() -> Path | None:
    """The directory of the config pack: inside the package in a wheel, beside it in a checkout."""
    spec = importlib.util.find_spec("lightning_gemini")  # finds a top-level package without running it
    for location in (spec.submodule_search_locations or ()) if spec else ():
        package = Path(location)
        # `pkg://` would need an __init__.py among the YAML files; and a `configs` beside a package may be anyone's, hence the look inside.
        for directory in (package / "configs", package.parent / "configs"):
            if (directory / "strategy" / "gemini.yaml").is_file():
                return directory
    return None
