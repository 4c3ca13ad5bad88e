"""What the tests of this folder train: the recipe's model, tiny, under each strategy, and a record of what is in the snapshots."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_gemini import GeminiFSDP2Strategy, GeminiStrategy
from tests.support.jobs import Recorder, Result, run_job

for needed in ("transformers", "peft"):  # whoever imports this is skipped without them
    pytest.importorskip(needed, reason=f"{needed} is missing: pip install 'lightning_gemini[llama]'")

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "llama"
TINY = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "attention_dropout": 0.1,
}  # fmt: skip
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def llama(**options: Any) -> pl.LightningModule:
    """The recipe's model."""
    if str(RECIPE) not in sys.path:
        sys.path.insert(0, str(RECIPE))
    from llama_model import Llama

    return Llama(**{"net": TINY, "warmup_steps": 2, "lr": 1e-2} | options)  # type: ignore[no-any-return]


class Tokens(Dataset[dict[str, torch.Tensor]]):
    """Random text, the same everywhere."""

    def __init__(self, size: int) -> None:
        self.ids = torch.randint(0, TINY["vocab_size"], (size, 17), generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index, :-1], "labels": self.ids[index, 1:]}


class Watch(pl.Callback):
    """Writes, at the end: bytes of this rank's parameters, what is in its newest snapshot, and how often this process has compiled."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.compiled: dict[int, int] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.compiled[trainer.global_step] = torch._dynamo.utils.counters["stats"]["unique_graphs"]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        memory: Any = trainer.strategy.engine.memory  # type: ignore[attr-defined]
        memory.settle()
        owned = memory.owned()
        sizes = {entry.name: entry.tensor.numel() * entry.tensor.element_size() for entry in memory.entries()}
        seen = {
            "sizes": sizes, "base": sorted(memory.frozen.names), "slot": memory.arena.capacity, "received": memory.received,
            "owned": [part.name for part, _ in owned.parts], "bytes": sum(part.length for part, _ in owned.parts),
            "compiled": self.compiled,
        }  # fmt: skip
        digests = {name: hashlib.sha256(p.detach().contiguous().view(torch.uint8).numpy()).hexdigest()
                   for name, p in pl_module.named_parameters() if not hasattr(p, "to_local")}  # fmt: skip
        (self.directory / f"seen-{trainer.global_rank}.json").write_text(json.dumps(seen | {"digests": digests}))


@dataclass(frozen=True)
class Job:
    """A training. `kind`: ddp, fsdp, hsdp."""

    kind: str = "ddp"
    world: int = 2
    steps: int = 5
    precision: Any = "32-true"
    nodes: int = 1
    model: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    own_base: bool = False
    """Every process but the first of rank 0 draws other weights."""

    def train(self, directory: Path, faults: list[dict[str, Any]], *callbacks: pl.Callback) -> None:
        """As every rank executes it."""
        pl.seed_everything(1)
        strategy: Any = GeminiStrategy(faults=faults, **self.options)  # type: ignore[arg-type]
        if self.kind != "ddp":
            strategy = GeminiFSDP2Strategy(data_parallel_size=self.world, tensor_parallel_size=1, faults=faults, **self.options)  # type: ignore[arg-type]
        trainer = pl.Trainer(
            accelerator="cpu", devices=self.world // self.nodes, num_nodes=self.nodes, strategy=strategy, max_steps=self.steps,
            precision=self.precision, logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=str(directory),
            gradient_clip_val=0.5, callbacks=[*callbacks, Recorder(str(directory)), Watch(directory)],
        )  # fmt: skip
        first = os.environ["LIGHTNING_GEMINI_RANK"] == "0"
        seed = os.getpid() if self.own_base and not first else 1
        model = llama(**self.model, seed=seed, replicate=2 if self.kind == "hsdp" else 1)
        trainer.fit(model, DataLoader(Tokens(16 * self.world), batch_size=2, shuffle=True))

    def run(self, directory: Path, *faults: dict[str, Any]) -> Result:
        """A job to its end."""
        return run_job(directory, lambda: self.train(directory, list(faults)), self.world)


def seen(result: Result, rank: int) -> dict[str, Any]:
    """What `Watch` has written."""
    found: dict[str, Any] = json.loads((result.directory / f"seen-{rank}.json").read_text())
    return found
