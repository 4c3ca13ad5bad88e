"""Train the small GPT: ``python recipes/gpt/train.py [key=value ...]``; the keys are those of ``config/train.yaml``."""

import hydra
import lightning as L
import torch
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="config", config_name="train")
def main(cfg: DictConfig) -> None:
    torch.set_num_threads(cfg.torch_threads)
    L.seed_everything(cfg.seed, workers=True)
    data: L.LightningDataModule = hydra.utils.instantiate(cfg.data)
    model: L.LightningModule = hydra.utils.instantiate(cfg.model)
    callbacks: list[L.Callback] = [hydra.utils.instantiate(c) for c in cfg.callbacks.values() if c]
    trainer: L.Trainer = hydra.utils.instantiate(cfg.trainer, callbacks=callbacks)
    trainer.fit(model, datamodule=data)


if __name__ == "__main__":
    main()
