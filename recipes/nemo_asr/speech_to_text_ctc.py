"""Train a character-based CTC model with NeMo: ``python recipes/nemo_asr/speech_to_text_ctc.py [key=value ...]``.

A script in the style of NeMo's own ``examples/asr``: it knows NeMo and Lightning, and nothing else. The keys are those of ``config/``;
``--config-name conformer_ctc`` trains the other model. What it has that NeMo's has not: seeds, without which no two runs can be compared.
"""

import requirements  # isort: skip  # noqa: F401  first: says what is missing before anything fails in its own way

import random

import lightning.pytorch as pl
from nemo.collections.asr.models import EncDecCTCModel
from nemo.core.config import hydra_runner
from nemo.utils import logging
from nemo.utils.exp_manager import exp_manager
from nemo.utils.trainer_utils import resolve_trainer_cfg
from omegaconf import DictConfig, OmegaConf


@hydra_runner(config_path="config", config_name="quartznet")
def main(cfg: DictConfig) -> None:
    logging.info(f"Hydra config: {OmegaConf.to_yaml(cfg)}")
    pl.seed_everything(cfg.seed, workers=True)
    trainer = pl.Trainer(**resolve_trainer_cfg(cfg.trainer))
    exp_manager(trainer, cfg.get("exp_manager", None))
    asr_model = EncDecCTCModel(cfg=cfg.model, trainer=trainer)
    asr_model.maybe_init_from_pretrained_checkpoint(cfg)
    seed_augmenters(asr_model, cfg.seed + trainer.global_rank)
    trainer.fit(asr_model)


def seed_augmenters(model: EncDecCTCModel, seed: int) -> None:
    """NeMo's augmenters draw from generators of their own, which begin anywhere."""
    for module in model.modules():
        for generator in vars(module).values():
            if isinstance(generator, random.Random):
                generator.seed(seed)


if __name__ == "__main__":
    main()
