"""Train or fine-tune a language model of NeMo 2.x: ``python recipes/nemo_llm/train.py --config-name llama3_8b [key=value ...]``.

The keys are those of the file in ``config/``. The script is an ordinary NeMo + Hydra script; recovery is ``+strategy=gemini_megatron``.
"""

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from lightning_gemini.nemo.checks import require_runnable


@hydra.main(version_base="1.3", config_path="config", config_name="llama3_8b")
def main(cfg: DictConfig) -> None:
    trainer = OmegaConf.to_container(cfg.trainer, resolve=True)
    require_runnable(trainer, torch.cuda.device_count())
    from nemo.collections import llm

    parts = {key: hydra.utils.instantiate(cfg[key]) for key in ("model", "data", "trainer", "optim", "log", "resume")}
    if "peft" in cfg:
        llm.finetune(peft=hydra.utils.instantiate(cfg.peft), **parts)
    elif cfg.task == "finetune":
        llm.finetune(**parts)
    else:
        llm.pretrain(**parts)


if __name__ == "__main__":
    main()
