"""An emulation of CUDA on the CPU, for Megatron and NeMo only: their code asks for "cuda" by name. Nothing of it is in the product.

    devices     `device="cuda"`, `.cuda()` and `torch.cuda.current_device()` mean the CPU
    types       `tensor.type()` says `torch.cuda.FloatTensor`, which Megatron's optimizers ask for
    streams     do nothing: an operation is over when it returns
    generators  the RNG tracker forks torch's global generator, which stands for the device's

What it cannot tell: anything about NCCL, streams, fused kernels, Transformer Engine. `enable()` is called in a rank, before the model is
built, and lasts for the process.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def _is_cuda(value: Any) -> bool:
    return (isinstance(value, str) and value.startswith("cuda")) or (isinstance(value, torch.device) and value.type == "cuda")


class CpuForCuda(TorchFunctionMode):
    """Devices and types."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return func(*(_CPU if _is_cuda(arg) else arg for arg in args), **kwargs)


class _Stream:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self  # `record_event` gives an event

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def _stream(_: Any) -> Iterator[None]:
    yield


def enable() -> None:
    """From now on this process has one device, the CPU."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.device_count = lambda: 1
    cuda.set_device = cuda.synchronize = cuda.empty_cache = lambda *_: None
    cuda.Stream = cuda.Event = cuda.ExternalStream = _Stream
    cuda.stream = _stream
    cuda.current_stream = cuda.default_stream = _Stream
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed) and None
    cuda.manual_seed_all = lambda seed: None
    _tracker()
    _without_transformer_engine()
    CpuForCuda().__enter__()


def _tracker() -> None:
    """Megatron sets and reads the device's generator through these two; on the CPU it is torch's global one, forked by the tracker."""
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    logging.getLogger(random.__name__).setLevel(logging.ERROR)  # it warns that the CPU's generator changes, which stands for the device's


def _without_transformer_engine() -> None:
    """megatron-core 0.13.1 asks for two functions by names that it has only with Transformer Engine, NeMo's LoRA for a class."""
    from megatron.core.transformer.moe import moe_utils
    from nemo.collections.llm.peft import lora, utils

    for name in ("te_general_gemm", "fused_permute", "fused_unpermute"):
        if not hasattr(moe_utils, name):
            setattr(moe_utils, name, None)
    if not lora.HAVE_TE:
        lora.te, utils.HAVE_TE = SimpleNamespace(Linear=None), False
