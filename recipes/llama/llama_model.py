"""Llama from ``transformers``' config classes as a LightningModule: DDP, FSDP2 and HSDP, and LoRA with ``peft``. Nothing is downloaded.

The network is built on the meta device, sharded, and only then given memory, so that no rank ever holds more than its part. Each weight
is drawn from a generator of its own, seeded by its name and the place of the shard: any process that builds rank r's part gets the same
bits. With ``weights`` they are read from a file instead.
"""

import hashlib
import math
from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM


def build(net: dict[str, Any], lora: dict[str, Any] | None = None) -> nn.Module:
    """The network, on whatever device is the default one; with ``lora``, adapters in it, and all else frozen.

    Args:
        net: keys of ``LlamaConfig``.
        lora: keys of ``peft.LoraConfig``.
    """
    model: nn.Module = LlamaForCausalLM(LlamaConfig(use_cache=False, **net))
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora), autocast_adapter_dtype=False)
    return model


class Llama(L.LightningModule):
    """A causal language model.

    Args:
        net: keys of ``transformers.LlamaConfig``.
        lora: keys of ``peft.LoraConfig``; ``None`` trains all weights.
        weights: file of a state dict (``torch.save``) with the base's weights; ``None`` draws them.
        replicate: with a sharding strategy, the number of replicas of each shard (HSDP); 1 shards over all ranks (FSDP2).
        checkpoint_activations: compute activations of each layer again in the backward.
        compile: backend of ``torch.compile`` for each layer, such as inductor; ``None`` does not compile.
        seed: of the drawn weights.
        lr, weight_decay, warmup_steps: of AdamW.
    """

    def __init__(
        self,
        net: dict[str, Any],
        lora: dict[str, Any] | None = None,
        weights: str | None = None,
        replicate: int = 1,
        checkpoint_activations: bool = False,
        compile: str | None = None,
        seed: int = 1,
        lr: float = 3e-4,
        weight_decay: float = 0.1,
        warmup_steps: int = 10,
    ) -> None:
        super().__init__()
        if lora:  # peft and what it makes on first use: a spare has it ahead of time, and needs none of it when it takes a rank
            with torch.device("meta"):
                build(net, lora)
        self.save_hyperparameters()
        self.options, self.lora, self.weights, self.replicate, self.seed = net, lora, weights, replicate, seed
        self.checkpoint_activations, self.compile_backend = checkpoint_activations, compile
        self.lr, self.weight_decay, self.warmup_steps = lr, weight_decay, warmup_steps
        self.net: nn.Module | None = None

    def configure_model(self) -> None:
        """Build, shard where the strategy has a device mesh, take memory, fill it. Safe to call again."""
        if self.net is not None:
            return
        with torch.device("meta"):
            net = build(self.options, self.lora)
        layers = list(layers_of(net))
        if self.checkpoint_activations:
            base: Any = net.get_base_model() if self.lora else net  # type: ignore[operator]
            base.gradient_checkpointing_enable({"use_reentrant": False})
        if self.compile_backend:
            for layer in layers:
                layer.compile(backend=self.compile_backend)
        if self.device_mesh is not None:
            shard([*layers, net], self._mesh())
        net.to_empty(device=self.device)
        fill(net, self.seed, self.weights)
        self.net = net

    def _mesh(self) -> DeviceMesh:
        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        if self.replicate == 1:
            return mesh
        return init_device_mesh(self.device.type, (self.replicate, mesh.size() // self.replicate), mesh_dim_names=("replicate", "shard"))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        assert self.net is not None
        logits: Tensor = self.net(input_ids=batch["input_ids"]).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten())
        self.log("train_loss", loss, on_step=True, on_epoch=False, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW over what trains: a frozen parameter that an optimizer holds would count as state of each step."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay, betas=(0.9, 0.95))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, self.warmup_steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def layers_of(net: nn.Module) -> Iterable[nn.Module]:
    """The decoder layers."""
    return (module for module in net.modules() if type(module).__name__ == "LlamaDecoderLayer")


def shard(modules: list[nn.Module], mesh: DeviceMesh) -> None:
    """FSDP2, or HSDP for a mesh of two dimensions; the root comes last."""
    from torch.distributed.fsdp import fully_shard

    for module in modules:
        fully_shard(module, mesh=mesh)


def fill(net: nn.Module, seed: int, weights: str | None) -> None:
    """Give a network that has memory its values: the parts of ``weights`` that this rank holds, and drawn ones for all else."""
    given: dict[str, Tensor] = torch.load(weights, map_location="cpu", mmap=True, weights_only=True) if weights else {}
    for name, parameter in net.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        with torch.no_grad():
            if plain in given:
                _copy(parameter, given[plain])
            else:
                _draw(parameter, plain, seed)
    for module in net.modules():  # its buffers are computed, not stored: the meta device has lost them
        if type(module).__name__ == "LlamaRotaryEmbedding":
            with next(net.parameters()).device:
                fresh = type(module)(module.config)  # type: ignore[call-arg]
            for name, buffer in module.named_buffers():
                buffer.copy_(fresh.get_buffer(name))


def _copy(parameter: Tensor, whole: Tensor) -> None:
    if isinstance(parameter, DTensor):  # src_data_rank=None: each rank cuts its own part, without a collective
        whole = distribute_tensor(whole.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(whole)


def _draw(parameter: Tensor, name: str, seed: int) -> None:
    target, place = parameter, ""
    if isinstance(parameter, DTensor):
        coordinate = parameter.device_mesh.get_coordinate() or []
        place = ".".join(str(c) for c, cut in zip(coordinate, parameter.placements, strict=True) if not cut.is_replicate())
        target = parameter.to_local()
    if name.endswith("norm.weight"):
        target.fill_(1.0)
    elif "lora_B" in name:
        target.zero_()
    else:
        number = int.from_bytes(hashlib.blake2b(f"{seed}/{name}/{place}".encode(), digest_size=7).digest(), "little")
        std = 1 / math.sqrt(parameter.shape[-1]) if "lora_A" in name else 0.02
        target.normal_(0.0, std, generator=torch.Generator(target.device).manual_seed(number))
