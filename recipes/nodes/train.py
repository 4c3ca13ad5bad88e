"""Train a tiny model on several nodes: ``bash recipes/nodes/two_nodes.sh``, or on one: ``python recipes/nodes/train.py [key=value ...]``.

The keys are those of ``config/train.yaml``. The script is an ordinary Lightning + Hydra script and knows nothing of ``lightning_gemini``.
"""

import hydra
import lightning as L
import torch
from nodes_model import Losses
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="config", config_name="train")
def main(cfg: DictConfig) -> None:
    torch.set_num_threads(1)
    L.seed_everything(cfg.seed, workers=True)
    trainer: L.Trainer = hydra.utils.instantiate(cfg.trainer, callbacks=[Losses(cfg.trainer.default_root_dir, cfg.step_s)])
    trainer.fit(hydra.utils.instantiate(cfg.model))


if __name__ == "__main__":
    main()
