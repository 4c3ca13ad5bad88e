"""What Hydra calls in every process of a job that has chosen `+rendezvous=peer`.

Seam: Hydra's `Callback`. It runs before the user's function, so that the user's code, and whatever initialises torch for it, need not know.
"""

from __future__ import annotations

from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from lightning_gemini.rendezvous.initialize import use_peer_rendezvous


class PeerRendezvous(Callback):
    """See the module's docstring. An option that is wrong ends the process: Hydra turns an exception of a callback into a warning."""

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Options are those under `rendezvous`."""
        options = OmegaConf.to_container(config.rendezvous, resolve=True)
        assert isinstance(options, dict)
        try:
            use_peer_rendezvous(**{str(key): value for key, value in options.items()})
        except ValueError as error:
            raise SystemExit(f"lightning_gemini: {error}") from None
