"""A record of a run that two runs can be compared by, bit for bit; and how often each process has compiled."""

import hashlib
import json
import os
from typing import Any

import lightning as L
import torch
from torch import Tensor


class Record(L.Callback):
    """Writes ``<dir>/rank<r>.json`` at the end of training.

    Keys: ``losses``, from step to the loss in hex; ``params`` and ``optimizer``, hashes of what this rank holds at the end; ``trained``
    and ``frozen``, parameters on this rank; ``steps``; ``pid``; ``compiled``, from step to the number of graphs that this process has
    compiled by then. Two runs did the same exactly when all but the last two are equal.
    """

    def __init__(self, dir: str) -> None:
        self.dir = dir
        self.losses: dict[int, str] = {}
        self._compiled: dict[int, int] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses[trainer.global_step] = float(outputs["loss"]).hex()
        self._compiled[trainer.global_step] = torch._dynamo.utils.counters["stats"]["unique_graphs"]

    def state_dict(self) -> dict[str, Any]:
        return {"losses": dict(self.losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses = dict(state_dict["losses"])

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        parameters = list(pl_module.parameters())
        state = [value for optimizer in trainer.optimizers for each in optimizer.state.values() for _, value in sorted(each.items())]
        record = {
            "losses": self.losses,
            "params": digest(parameters),
            "optimizer": digest([value for value in state if isinstance(value, Tensor)]),
            "trained": sum(held(p).numel() for p in parameters if p.requires_grad),
            "frozen": sum(held(p).numel() for p in parameters if not p.requires_grad),
            "steps": trainer.global_step,
            "pid": os.getpid(),
            "compiled": self._compiled,
        }
        os.makedirs(self.dir, exist_ok=True)
        with open(os.path.join(self.dir, f"rank{trainer.global_rank}.json"), "w") as out:
            json.dump(record, out, indent=1)


def held(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def digest(tensors: list[Tensor]) -> str:
    """SHA-256 of local tensors."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(held(tensor).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
