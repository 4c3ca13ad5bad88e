"""Train a tiny model on text whose batches outlive a rank: ``python recipes/data/train.py +data=mmap [key=value ...]``.

The keys are those of ``config/train.yaml``. The script is an ordinary Lightning + Hydra script; of ``lightning_gemini`` it uses a data
module, in the configuration, and whatever is named on the command line.
"""

import os

import hydra
import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf

OmegaConf.register_new_resolver("standard_library", lambda: os.path.dirname(os.__file__), replace=True)


@hydra.main(version_base="1.3", config_path="config", config_name="train")
def main(cfg: DictConfig) -> None:
    torch.set_num_threads(1)
    L.seed_everything(cfg.seed, workers=True)
    data: L.LightningDataModule = hydra.utils.instantiate(cfg.data)
    model: L.LightningModule = hydra.utils.instantiate(cfg.model)
    callbacks: list[L.Callback] = [hydra.utils.instantiate(c) for c in cfg.callbacks.values() if c]
    trainer: L.Trainer = hydra.utils.instantiate(cfg.trainer, callbacks=callbacks)
    trainer.fit(model, datamodule=data, ckpt_path=cfg.ckpt_path)


if __name__ == "__main__":
    main()
