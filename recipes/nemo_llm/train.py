"""Train or fine-tune a language model of NeMo 2.x: ``python recipes/nemo_llm/train.py --config-name llama3_8b [key=value ...]``.

The keys are those of the file in ``config/``. The script is an ordinary NeMo + Hydra script; recovery is ``+strategy=gemini_megatron``.
"""

from typing import Any

import hydra
import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from lightning_gemini.nemo.checks import require_runnable
from lightning_gemini.nemo.versions import require_nemo


def trainer_of(cfg: DictConfig) -> Any:
    """The Trainer, once the machine and what is installed have been looked at; one line says what is wrong. It comes before models and
    data: their tokenizers may be downloaded."""
    try:
        require_runnable(OmegaConf.to_container(cfg.trainer, resolve=True), torch.cuda.device_count())
        require_nemo()
        return hydra.utils.instantiate(cfg.trainer)
    except (ValueError, ImportError, InstantiationException) as error:
        raise SystemExit(f"nemo_llm: {error.__cause__ or error}") from None


@hydra.main(version_base="1.3", config_path="config", config_name="llama3_8b")
def main(cfg: DictConfig) -> None:
    trainer = trainer_of(cfg)
    from nemo.collections import llm

    parts = {"trainer": trainer} | {key: hydra.utils.instantiate(cfg[key]) for key in ("model", "data", "optim", "log", "resume")}
    if "peft" in cfg:
        llm.finetune(peft=hydra.utils.instantiate(cfg.peft), **parts)
    elif cfg.task == "finetune":
        llm.finetune(**parts)
    else:
        llm.pretrain(**parts)


if __name__ == "__main__":
    main()
