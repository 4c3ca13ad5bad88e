"""A small byte-level GPT as a LightningModule: single device, DDP, or FSDP2 (Lightning's ``ModelParallelStrategy``)."""

import math

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

VOCAB_SIZE = 256  # bytes


class Attention(nn.Module):
    def __init__(self, n_head: int, n_embd: int, dropout: float) -> None:
        super().__init__()
        self.n_head = n_head
        self.dropout = dropout
        self.qkv = nn.Linear(n_embd, 3 * n_embd)
        self.proj = nn.Linear(n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.n_head, c // self.n_head).permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        out: Tensor = self.proj(y.transpose(1, 2).reshape(b, t, c))
        return out


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, n_head: int, n_embd: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(n_embd)
        self.attn = Attention(n_head, n_embd, dropout)
        self.norm2 = nn.LayerNorm(n_embd)
        self.up = nn.Linear(n_embd, 4 * n_embd)
        self.down = nn.Linear(4 * n_embd, n_embd)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.norm1(x)))
        x = x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))
        return x


class Transformer(nn.Module):
    """Decoder-only transformer with learned positions: bytes ``(batch, time)`` to logits ``(batch, time, 256)``."""

    def __init__(self, n_layer: int, n_head: int, n_embd: int, block_size: int, dropout: float) -> None:
        super().__init__()
        self.block_size = block_size
        self.token = nn.Embedding(VOCAB_SIZE, n_embd)
        self.position = nn.Embedding(block_size, n_embd)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(n_head, n_embd, dropout) for _ in range(n_layer))
        self.norm = nn.LayerNorm(n_embd)
        self.head = nn.Linear(n_embd, VOCAB_SIZE, bias=False)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                residual = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * n_layer) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx: Tensor) -> Tensor:
        t = idx.shape[1]
        if t > self.block_size:
            raise ValueError(f"model.block_size={self.block_size}: got {t} tokens; set data.block_size and model.block_size to one value")
        x: Tensor = self.drop(self.token(idx) + self.position(torch.arange(t, device=idx.device)))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class GPT(L.LightningModule):
    """Byte-level language model.

    Args:
        n_layer, n_head, n_embd, block_size, dropout: the size of the network.
        lr, betas, weight_decay: of AdamW; weight decay applies to matrices only.
        warmup_steps: optimizer steps of linear warm-up.
        decay_steps: the step at which the cosine ends at ``min_lr_ratio * lr``; ``<= 0`` keeps the rate after warm-up.
    """

    def __init__(
        self,
        n_layer: int = 4,
        n_head: int = 4,
        n_embd: int = 192,
        block_size: int = 128,
        dropout: float = 0.1,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        warmup_steps: int = 20,
        decay_steps: int = -1,
        min_lr_ratio: float = 0.1,
    ) -> None:
        super().__init__()
        if n_embd % n_head:
            raise ValueError(f"model.n_embd={n_embd} is no multiple of model.n_head={n_head}; change one of them")
        self.save_hyperparameters()
        self.betas = (float(betas[0]), float(betas[1]))
        self.lr, self.weight_decay = lr, weight_decay
        self.warmup_steps, self.decay_steps, self.min_lr_ratio = warmup_steps, decay_steps, min_lr_ratio
        self.net = Transformer(n_layer, n_head, n_embd, block_size, dropout)

    def configure_model(self) -> None:
        """Shard the blocks and the root with FSDP2 where the strategy gave a device mesh. Safe to call again."""
        if self.device_mesh is None:
            return
        from torch.distributed.fsdp import FSDPModule, fully_shard

        mesh = self.device_mesh["data_parallel"]
        for module in [*self.net.blocks, self.net]:
            if not isinstance(module, FSDPModule):
                fully_shard(module, mesh=mesh)

    def forward(self, idx: Tensor) -> Tensor:
        logits: Tensor = self.net(idx)
        return logits

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x).flatten(0, 1), y.flatten())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=False, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch), on_step=False, on_epoch=True, prog_bar=True, sync_dist=True)

    def lr_factor(self, step: int) -> float:
        """The learning rate of optimizer step ``step`` (from 0) over ``lr``."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.decay_steps <= 0:
            return 1.0
        done = min(1.0, (step - self.warmup_steps) / max(1, self.decay_steps - self.warmup_steps))
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        matrices = [p for p in self.parameters() if p.dim() > 1]
        vectors = [p for p in self.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, self.lr_factor), "interval": "step"}}
