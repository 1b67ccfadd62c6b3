# SPDX-License-Identifier: Apache-2.0
"""Stands in for CUDA where megatron-core and mbridge ask for it, for a process that runs Megatron tests only."""

import contextlib
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class CudaIsTheCpu(TorchFunctionMode):
    """Takes the device "cuda" for the CPU, and calls tensor types by CUDA's names, as mcore's optimizers ask."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return func(*(CPU if _is_cuda(arg) else arg for arg in args), **kwargs)


def _is_cuda(device: Any) -> bool:
    return isinstance(device, str | torch.device) and str(device).split(":")[0] == "cuda"


class Stream:
    """A stream or an event of a device that does everything at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...


def install() -> None:
    """Changes ``torch.cuda`` for good; call it once, at the start of a process."""
    # Compiled functions of megatron-core look torch.cuda up when they are defined: its modules come first.
    import megatron.core.models.gpt.gpt_model
    import megatron.core.optimizer  # noqa: F401
    from megatron.core.tensor_parallel import random

    cuda = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None
    cuda.Stream = cuda.Event = Stream
    cuda.current_stream = lambda device=None: Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.nvtx.range_push = lambda text: None
    cuda.nvtx.range_pop = lambda: None
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    torch.nn.Module.cuda = lambda self, device=None: self
    CudaIsTheCpu().__enter__()
