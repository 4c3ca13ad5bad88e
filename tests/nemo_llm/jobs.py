"""A tiny Llama in NeMo's own way: `llm.GPTModel`, `MegatronOptimizerModule`, `MegatronDataSampler`, NeMo's Trainer; CUDA is emulated."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

from tests.support.jobs import Recorder, Result, digest, run_job
from tests.support.plain import run_plain

SEQUENCE, VOCABULARY = 16, 64


class Tokens(Dataset[dict[str, torch.Tensor]]):
    """Random tokens, and noise from the global generator, as augmentation would draw."""

    def __init__(self, size: int) -> None:
        self.data = torch.randint(0, VOCABULARY, (size, SEQUENCE + 1), generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.data[index]
        mask = torch.ones(1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
        weights, places = torch.rand(SEQUENCE).round() + 0.5, torch.arange(SEQUENCE)
        return {"tokens": row[:-1], "labels": row[1:], "loss_mask": weights, "position_ids": places, "attention_mask": mask}


class Data(pl.LightningDataModule):
    """Micro-batches of two; a step has two of them with one data parallel pair."""

    def __init__(self, size: int = 256) -> None:
        super().__init__()
        from nemo.lightning.pytorch.plugins import MegatronDataSampler

        self.size = size
        self.data_sampler = MegatronDataSampler(seq_len=SEQUENCE, micro_batch_size=2, global_batch_size=8)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Tokens(self.size))

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Tokens(32))


class MegatronRecorder(Recorder):
    """Of the tensors in Megatron's optimizers too, and the generators of its RNG tracker."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        super().on_train_batch_end(trainer, pl_module, {"loss": loss}, batch, trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

        from lightning_gemini.nemo.tensors import inner_optimizers

        inner = inner_optimizers(getattr(o, "optimizer", o) for o in trainer.strategy.optimizers)
        moments = [v for o in inner for p in o.state.values() for _, v in sorted(p.items()) if isinstance(v, torch.Tensor)]
        record = {
            "losses": self.losses,
            "params": digest(list(pl_module.parameters())),
            "optimizer": digest(moments + [p for o in inner for g in o.param_groups for p in g["params"]]),
            "lr": [g["lr"] for o in inner for g in o.param_groups],
            "steps": trainer.global_step,
            "rng": digest([torch.get_rng_state(), *get_cuda_rng_tracker().get_states().values()]),
            "metrics": {k: float(v) for k, v in sorted(trainer.callback_metrics.items())},
        }
        (Path(self.directory) / f"rank{trainer.global_rank}.json").write_text(json.dumps(record))
        engine = getattr(trainer.strategy, "engine", None)
        if engine is not None:
            memory = engine.memory
            owned = sorted({part.name for part, _ in memory.owned().parts})
            seen = {"owned": owned, "base": sorted(memory.frozen.names), "received": memory.received}
            (Path(self.directory) / f"memory{trainer.global_rank}.json").write_text(json.dumps(seen))


def memory_of(result: Result, rank: int) -> dict[str, Any]:
    """What a rank of our Strategy had in its snapshot at the end, what of the base, and how many bytes of that came from a live replica."""
    found: dict[str, Any] = json.loads((result.directory / f"memory{rank}.json").read_text())
    return found


def build(*, distributed: bool = False, bf16: bool = False, dropout: float = 0.1, lora: bool = False, **config: Any) -> Any:
    """The model, with NeMo's LoRA around its linear layers where asked for."""
    from megatron.core.optimizer import OptimizerConfig
    from nemo.collections import llm
    from nemo.lightning.pytorch.optim import MegatronOptimizerModule

    llama = llm.LlamaConfig(
        num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, num_query_groups=2, seq_length=SEQUENCE,
        vocab_size=VOCABULARY, hidden_dropout=dropout, attention_dropout=dropout, bf16=bf16, gradient_accumulation_fusion=False,
        masked_softmax_fusion=False, bias_dropout_fusion=False, bias_activation_fusion=False, apply_rope_fusion=False,
        persist_layer_norm=False, cross_entropy_loss_fusion=False, **config,
    )  # fmt: skip
    optimizer = OptimizerConfig(lr=1e-2, bf16=bf16, clip_grad=0.0, use_distributed_optimizer=distributed, weight_decay=0.1)
    transform = llm.peft.LoRA(dim=4, alpha=8) if lora else None
    return llm.GPTModel(llama, optim=MegatronOptimizerModule(optimizer), model_transform=transform)


def train(directory: Path, strategy: Any, per_node: int, *, steps: int = 8, model: Any = None, callbacks: Any = (), **trainer: Any) -> None:
    """What a user's script does."""
    import nemo.lightning as nl
    from nemo.utils import logging

    logging.setLevel(logging.WARNING)
    model = model or build()
    transforms = [model.model_transform] if getattr(model, "model_transform", None) else []  # as `llm.finetune` does
    fitted = nl.Trainer(
        accelerator="cpu", devices=per_node, strategy=strategy, max_steps=steps, logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, default_root_dir=str(directory), use_distributed_sampler=False,
        callbacks=[*transforms, *callbacks, MegatronRecorder(str(directory))],
        **{"num_sanity_val_steps": 0, "limit_val_batches": 0, "val_check_interval": None} | trainer,
    )  # fmt: skip
    fitted.fit(model, Data())


def _given(strategy: dict[str, Any]) -> dict[str, Any]:
    from megatron.core.distributed import DistributedDataParallelConfig

    dtype, ddp = strategy.get("pipeline_dtype"), strategy.get("ddp")
    made = {"pipeline_dtype": getattr(torch, dtype) if dtype else None} | ({"ddp": DistributedDataParallelConfig(**ddp)} if ddp else {})
    return {"ckpt_async_save": False, **strategy, **made}


def run(
    directory: Path,
    per_node: int,
    strategy: dict[str, Any],
    model: dict[str, Any],
    spare_model: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """What each rank of a job under our Strategy does."""
    from tests.nemo_llm import cpu

    cpu.enable()
    from lightning_gemini.nemo import GeminiMegatronStrategy

    spare = not os.environ.get("LIGHTNING_GEMINI_RANK")
    train(
        directory,
        GeminiMegatronStrategy(**_given(strategy)),
        per_node,
        model=build(**model, **(spare_model or {} if spare else {})),
        **options,
    )


def job(
    directory: Path, world: int, strategy: dict[str, Any], model: dict[str, Any], faults: Any = (), snapshot: Any = None, **options: Any
) -> Result:
    """Under our Strategy, on one node. `spare_model`: what spares build otherwise."""
    given = {**strategy, "faults": list(faults), "snapshot": snapshot}
    return run_job(directory, lambda: run(directory, world, given, model, **options), world, timeout_s=150)


def plain(directory: Path, world: int, strategy: dict[str, Any], model: dict[str, Any], **options: Any) -> Result:
    """Under NeMo's own."""

    def target() -> None:
        from tests.nemo_llm import cpu

        cpu.enable()
        from nemo.lightning.pytorch.strategies import MegatronStrategy

        train(directory, MegatronStrategy(**_given(strategy)), world, model=build(**model), **options)

    return run_plain(directory, target, world, timeout_s=150)
