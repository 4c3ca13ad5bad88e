"""Train a Llama: ``python recipes/llama/train.py [model=tiny] [+strategy=gemini] [key=value ...]``; the keys are those of ``config/``.

An ordinary Lightning + Hydra script. Of ``lightning_gemini`` it uses a data module, in the configuration, and whatever is named on the
command line.
"""

import importlib.util
import os
from typing import Any

import hydra
import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf

OmegaConf.register_new_resolver("standard_library", lambda: os.path.dirname(os.__file__), replace=True)


def check(cfg: DictConfig) -> None:
    """Raise `ValueError` for parallel sizes that do not fit, and for a recipe of GPUs without one. Fills in sizes that are "auto"."""
    for package in ("transformers", *(["peft"] if cfg.model.get("lora") else [])):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{package} is not installed: pip install 'lightning_gemini[llama]'")
    trainer, strategy = cfg.trainer, cfg.trainer.strategy
    world, replicate = trainer.devices * trainer.num_nodes, cfg.model.replicate
    if trainer.accelerator == "gpu" and torch.cuda.device_count() < trainer.devices:
        raise ValueError(
            f"trainer.accelerator=gpu with trainer.devices={trainer.devices}, but this machine has {torch.cuda.device_count()} GPUs: give "
            "trainer.devices=, or for a trial without any: model=tiny trainer.accelerator=cpu trainer.precision=bf16-mixed"
        )
    if not OmegaConf.is_config(strategy) or "data_parallel_size" not in strategy:
        if replicate != 1:
            raise ValueError(f"model.replicate={replicate} is for sharded training: add +strategy=gemini_fsdp2, or leave it at 1")
        return
    if strategy.tensor_parallel_size == "auto":
        strategy.tensor_parallel_size = 1  # Lightning's meaning of "auto" is tensor parallelism over a node
    if strategy.data_parallel_size == "auto":
        strategy.data_parallel_size = world
    if strategy.tensor_parallel_size != 1:
        raise ValueError(f"trainer.strategy.tensor_parallel_size={strategy.tensor_parallel_size}: this recipe shards only; give 1")
    if strategy.data_parallel_size != world:
        raise ValueError(
            f"trainer.strategy.data_parallel_size={strategy.data_parallel_size} is not trainer.devices={trainer.devices} x "
            f"trainer.num_nodes={trainer.num_nodes} = {world}: give {world}, or auto"
        )
    if replicate < 1 or world % replicate:
        raise ValueError(f"model.replicate={replicate} does not divide the {world} ranks: give a divisor of {world}; 1 shards over all")


@hydra.main(version_base="1.3", config_path="config", config_name="train")
def main(cfg: DictConfig) -> None:
    try:
        check(cfg)
    except ValueError as error:
        raise SystemExit(f"llama: {error}") from None
    torch.set_num_threads(1)
    L.seed_everything(cfg.seed, workers=True)
    data: L.LightningDataModule = hydra.utils.instantiate(cfg.data)
    model: L.LightningModule = hydra.utils.instantiate(cfg.model)
    callbacks: list[Any] = [hydra.utils.instantiate(c) for c in cfg.callbacks.values() if c]
    trainer: L.Trainer = hydra.utils.instantiate(cfg.trainer, callbacks=callbacks)
    trainer.fit(model, datamodule=data, ckpt_path=cfg.ckpt_path)


if __name__ == "__main__":
    main()
