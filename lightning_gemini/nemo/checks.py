"""What a recipe asks of the machine and of the job's size, checked before anything is built or started. Pure.

Seam: `require_runnable(trainer, gpus)`, of the plain values of a recipe's `trainer`; `require_no_evaluation`, of what a Trainer was given.
Failure: one `ValueError` that names key, value and remedy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_gemini.nemo.parallel import Parallel

_SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "instances": "num_distributed_optimizer_instances",
}


def parallel_of(strategy: Mapping[str, Any], world: int) -> Parallel:
    """The parallel sizes among MegatronStrategy's arguments; missing ones are NeMo's defaults."""
    sizes = {name: strategy[key] for name, key in _SIZES.items() if strategy.get(key) is not None}
    return Parallel(world=world, pp_before_dp=bool(strategy.get("use_tp_pp_dp_mapping", False)), **sizes)


def require_runnable(trainer: Mapping[str, Any], gpus: int) -> Parallel:
    """The parallel sizes of a recipe, if this machine and the recipe's world can hold them.

    Args:
        trainer: arguments of NeMo's Trainer, with those of MegatronStrategy under `strategy`.
        gpus: of this machine.
    """
    devices, nodes = (_number(trainer, key) for key in ("devices", "num_nodes"))
    if trainer.get("accelerator") in ("gpu", "cuda"):
        if not gpus:
            raise ValueError("trainer.accelerator='gpu', but this machine has no GPU: run the recipe on one that torch finds GPUs on")
        if devices > gpus:
            raise ValueError(f"trainer.devices={devices}, but this machine has {gpus} GPUs: set trainer.devices={gpus}")
    return parallel_of(trainer.get("strategy") or {}, nodes * devices)


def _number(trainer: Mapping[str, Any], key: str) -> int:
    value = trainer.get(key, 1)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"trainer.{key}={value!r} is not valid: give the number, 1 or more")
    return value


def require_no_evaluation(parallel: Parallel, limit_val_batches: float | int | None) -> None:
    """Pipeline stages and experts send to each other alone, which between steps could not be replayed for a replaced rank."""
    for key, size in (("pipeline_model_parallel_size", parallel.pp), ("expert_model_parallel_size", parallel.ep)):
        if size > 1 and limit_val_batches != 0:
            raise ValueError(
                f"validation with {key}={size} cannot be recovered, because its stages send to each other outside of a step: set "
                "trainer.limit_val_batches=0 and evaluate checkpoints in a job of its own"
            )
