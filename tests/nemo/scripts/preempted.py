"""The recipe's script with NeMo's PreemptionCallback, which `exp_manager` adds where there are GPUs, after it and in the same way.

On CPU it needs an emulation, for NeMo broadcasts a tensor of the current GPU: here it is one of the CPU. At step 4, before a validation,
rank 0 sends SIGTERM to the process that the user started. Key of the command line: `+callback=true|false`.
"""

import os
import random
import signal
from typing import Any

import lightning.pytorch as pl
import torch
from nemo.collections.asr.models import EncDecCTCModel
from nemo.core.config import hydra_runner
from nemo.utils.callbacks import PreemptionCallback
from nemo.utils.exp_manager import exp_manager
from nemo.utils.trainer_utils import resolve_trainer_cfg
from omegaconf import DictConfig

from tests.nemo.conftest import RECIPE


class OnCpu(PreemptionCallback):
    @property
    def interrupted(self) -> bool:
        told = torch.tensor(self._interrupted, dtype=torch.int32)
        torch.distributed.broadcast(told, 0)
        return bool(told.item())


class Preempts(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 4 and trainer.is_global_zero:
            os.kill(os.getppid(), signal.SIGTERM)


@hydra_runner(config_path=str(RECIPE / "config"), config_name="quartznet")
def main(cfg: DictConfig) -> None:
    pl.seed_everything(cfg.seed, workers=True)
    trainer = pl.Trainer(**resolve_trainer_cfg(cfg.trainer), callbacks=[Preempts()])
    exp_manager(trainer, cfg.exp_manager)
    if cfg.callback:
        trainer.callbacks.append(OnCpu(trainer.checkpoint_callback))
    model = EncDecCTCModel(cfg=cfg.model, trainer=trainer)
    for module in model.modules():
        for generator in vars(module).values():
            if isinstance(generator, random.Random):
                generator.seed(cfg.seed + trainer.global_rank)
    trainer.fit(model)


if __name__ == "__main__":
    main()
