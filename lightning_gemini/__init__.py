"""lightning_gemini: the death of a rank costs seconds and no completed step.

Importing it registers the strategies "gemini" and "gemini_fsdp2" with Lightning, and `gemini://` with torch. The agent's process imports
the package too, and must start in milliseconds without torch, so there the public names are loaded only when they are asked for.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_gemini.callback import GeminiCallback
    from lightning_gemini.config import (
        DataConfig,
        FaultConfig,
        GeminiConfig,
        MembershipConfig,
        PersistentConfig,
        RecoveryConfig,
        RendezvousConfig,
        ReplicationConfig,
        SnapshotConfig,
        TelemetryConfig,
    )
    from lightning_gemini.mapped.module import MMapDataModule
    from lightning_gemini.mapped.trainer import use_mapped_data
    from lightning_gemini.rendezvous.initialize import init_process_group, use_peer_rendezvous
    from lightning_gemini.strategy import GeminiFSDP2Strategy, GeminiStrategy

__version__ = "0.1.0"

_HOMES = {
    "GeminiCallback": "callback",
    "GeminiStrategy": "strategy",
    "GeminiFSDP2Strategy": "strategy",
    "GeminiConfig": "config",
    "SnapshotConfig": "config",
    "RecoveryConfig": "config",
    "TelemetryConfig": "config",
    "FaultConfig": "config",
    "RendezvousConfig": "config",
    "DataConfig": "config",
    "ReplicationConfig": "config",
    "MembershipConfig": "config",
    "PersistentConfig": "config",
    "MMapDataModule": "mapped.module",
    "use_mapped_data": "mapped.trainer",
    "init_process_group": "rendezvous.initialize",
    "use_peer_rendezvous": "rendezvous.initialize",
}
__all__ = [
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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def _is_agent_or_cli() -> bool:
    light = ("lightning_gemini.agent", "lightning_gemini.storage.writer")
    return any(module in sys.orig_argv for module in light) or os.path.basename(sys.argv[0] or "") == "lightning-gemini"


if not _is_agent_or_cli():
    from lightning_gemini.rendezvous import initialize
    from lightning_gemini.strategy import register

    register()
    initialize.register()
