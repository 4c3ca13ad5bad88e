"""What Hydra calls in every process of a job that has chosen `+rendezvous=peer`, `+data=mmap` or `+strategy=gemini_megatron`.

Seam: Hydra's `Callback`. It runs before the user's function, so that the user's code, and whatever trains for it, need not know. An option
that is wrong ends the process: Hydra turns an exception of a callback into a warning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from lightning_gemini.mapped.trainer import use_mapped_data
from lightning_gemini.nemo.versions import require_nemo
from lightning_gemini.rendezvous.initialize import use_peer_rendezvous


class PeerRendezvous(Callback):
    """Options are those under `rendezvous`."""

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Before the user's function."""
        _apply(use_peer_rendezvous, config.rendezvous)


class MappedData(Callback):
    """Options are those under `mapped_data`."""

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Before the user's function."""
        _apply(use_mapped_data, config.mapped_data)


class NeMoLanguageModels(Callback):
    """What is installed. Hydra's own error for a class that cannot be imported leaves out why, and NeMo 3 would not let it be made."""

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Before the user's function."""
        try:
            require_nemo()
        except ImportError as error:
            raise SystemExit(f"lightning_gemini: {error}") from None


def _apply(use: Callable[..., None], node: DictConfig) -> None:
    options = OmegaConf.to_container(node, resolve=True)
    assert isinstance(options, dict)
    try:
        use(**{str(key): value for key, value in options.items()})
    except ValueError as error:
        raise SystemExit(f"lightning_gemini: {error}") from None
