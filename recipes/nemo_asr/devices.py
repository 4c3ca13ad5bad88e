"""A recipe for GPUs that is started without one: one line, where Lightning names neither key nor remedy."""

import torch
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf


def check(accelerator: str, devices: object, gpus: int) -> None:
    """Raise `ValueError` where a machine has fewer GPUs than the Trainer is to use. ``devices``: as Lightning takes them."""
    if accelerator not in ("gpu", "cuda"):
        return
    wanted = len(devices) if isinstance(devices, list) else int(str(devices)) if str(devices).isdigit() else 1
    if wanted > gpus:
        raise ValueError(
            f"trainer.accelerator={accelerator} with trainer.devices={devices}, but this machine has {gpus} GPUs: give trainer.devices=, "
            "or trainer.accelerator=cpu"
        )


class CheckDevices(Callback):
    """Hydra calls it before the script's function, in the process that the user starts too."""

    def on_job_start(self, config: DictConfig, **_: object) -> None:
        """Check the Trainer's devices."""
        trainer = OmegaConf.to_container(config.trainer, resolve=True)
        assert isinstance(trainer, dict)
        try:
            check(str(trainer.get("accelerator")), trainer.get("devices"), torch.cuda.device_count())
        except ValueError as error:
            raise SystemExit(f"nemo_asr: {error}") from None  # Hydra turns any other exception of a callback into a warning
