"""An ordinary user's Hydra and Lightning script under a strategy of Lightning's own; it knows nothing of lightning_gemini."""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from tests.support.sockets import uses


def digest(model: torch.nn.Module) -> str:
    """Of this rank's part of the parameters."""
    local = [getattr(p, "to_local", lambda p=p: p)().detach().numpy().tobytes() for p in model.parameters()]
    return hashlib.sha256(b"".join(local)).hexdigest()


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
        self.losses: list[str] = []

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Any) -> torch.Tensor:
        (x,) = batch
        loss = self.layer(x).square().mean()
        self.losses.append(float(loss.detach()).hex())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


@hydra.main(version_base="1.3", config_path="conf", config_name="plain")
def main(cfg: DictConfig) -> None:
    torch.set_num_threads(1)
    pl.seed_everything(1)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if cfg.parallel == "fsdp2" else cfg.parallel
    trainer = pl.Trainer(strategy=strategy, accelerator="cpu", devices=2, max_steps=4, logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=True)  # fmt: skip
    model = Model()
    trainer.fit(model, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(64, 32)), batch_size=4))
    seen = {"losses": model.losses, "parameters": digest(model), "tcpstore": uses(int(os.environ["MASTER_PORT"])),
            "ours": "lightning_gemini" in sys.modules, "loader": type(trainer.train_dataloader).__name__}  # fmt: skip
    (Path(cfg.directory) / f"rank{trainer.global_rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
