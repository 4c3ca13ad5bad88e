"""A record of a run that two runs can be compared by, bit for bit."""

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor


class Recorder(L.Callback):
    """Writes ``<dir>/rank<r>.json`` at the end of training: every step's loss on this rank, and hashes of the final state.

    Keys: ``rank``; ``pid``; ``losses``, from step to the loss's float32 in hex, big-endian; ``params``, a SHA-256 of all
    parameters and buffers (this rank's shards, where sharded); ``optimizer``, one of the optimizers' state and settings;
    ``steps``. Two runs did the same exactly when their files are equal but for ``pid``.
    """

    def __init__(self, dir: str) -> None:
        self.dir = dir
        self.losses: dict[int, str] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        if loss is not None:
            self.losses[trainer.global_step] = struct.pack(">f", loss.float().item()).hex()

    def state_dict(self) -> dict[str, Any]:
        return {"losses": dict(self.losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses = dict(state_dict["losses"])

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Here and not in on_fit_end: the strategy is whole, the parameters are where the training left them.
        record = {
            "rank": trainer.global_rank,
            "pid": os.getpid(),
            "losses": {str(step): self.losses[step] for step in sorted(self.losses)},
            "params": digest([*pl_module.named_parameters(), *pl_module.named_buffers()]),
            "optimizer": digest([optimizer.state_dict() for optimizer in trainer.optimizers]),
            "steps": trainer.global_step,
        }
        os.makedirs(self.dir, exist_ok=True)
        file = os.path.join(self.dir, f"rank{trainer.global_rank}.json")
        part = f"{file}.{os.getpid()}.part"
        with open(part, "w") as out:
            json.dump(record, out, indent=1)
            out.write("\n")
        os.replace(part, file)


def digest(value: Any) -> str:
    """SHA-256 of nested containers of tensors and scalars: types, shapes and bits count, the order of dict keys does not."""
    sha = hashlib.sha256()
    _feed(sha, value)
    return sha.hexdigest()


def _feed(sha: "hashlib._Hash", value: Any) -> None:
    if isinstance(value, Tensor):
        value = value.detach()
        if hasattr(value, "to_local"):  # DTensor
            value = value.to_local()
        sha.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        sha.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        sha.update(f"dict {len(value)};".encode())
        for key in sorted(value, key=lambda k: (type(k).__name__, k)):
            _feed(sha, key)
            _feed(sha, value[key])
    elif isinstance(value, list | tuple):
        sha.update(f"list {len(value)};".encode())
        for item in value:
            _feed(sha, item)
    else:
        sha.update(f"{type(value).__name__} {value!r};".encode())
