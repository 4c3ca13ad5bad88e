"""An ordinary user's Hydra script; it knows nothing of lightning_gemini."""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).resolve().parent))
from train import run


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> None:
    run(cfg.directory, hydra.utils.instantiate(cfg.trainer.strategy))


if __name__ == "__main__":
    main()
