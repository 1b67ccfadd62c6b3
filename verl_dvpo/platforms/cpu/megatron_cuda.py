# SPDX-License-Identifier: Apache-2.0
"""Stands in for CUDA where megatron-core and mbridge ask for it: the device "cuda" is plain memory for a while."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

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

    def synchronize(self) -> None: ...

    def record_event(self) -> "Stream":
        return self


# A function each, made once: compiled code is guarded by them, and they tell megatron-core's calls apart.
def _current_device() -> torch.device:
    return CPU


def _synchronize(device: Any = None) -> None: ...


def _empty_cache() -> None: ...


def _current_stream(device: Any = None) -> Stream:
    return Stream()


def _stream(stream: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def _get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.get_rng_state()


def _set_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


def _set_rng_state(state: torch.Tensor, device: Any = None) -> None:
    torch.set_rng_state(state)


def _range_push(text: str) -> None: ...


def _range_pop() -> None: ...


def _to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Hands a tensor of the device to a dispatcher of tokens, as numbers where it asks for them."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _module_on_cpu(self: torch.nn.Module, device: Any = None) -> torch.nn.Module:
    return self


_CUDA = {
    "current_device": _current_device,
    "synchronize": _synchronize,
    "empty_cache": _empty_cache,
    "Stream": Stream,
    "Event": Stream,
    "current_stream": _current_stream,
    "stream": _stream,
    "manual_seed": _manual_seed,
    "get_rng_state": _get_rng_state,
    "set_rng_state": _set_rng_state,
}

_depth = 0


@contextlib.contextmanager
def cuda_is_the_cpu() -> Iterator[None]:
    """Changes ``torch.cuda`` inside the block, in this process; another block inside changes nothing more.

    Compiled functions of megatron-core look ``torch.cuda`` up when they are defined, so its modules are imported first.
    """
    global _depth
    if _depth:
        yield
        return
    import megatron.core.models.gpt.gpt_model
    import megatron.core.optimizer  # noqa: F401
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **_CUDA))  # type: ignore[call-overload]
        stack.enter_context(mock.patch.multiple(torch.cuda.nvtx, range_push=_range_push, range_pop=_range_pop))
        stack.enter_context(mock.patch.multiple(random, _get_cuda_rng_state=_get_state, _set_cuda_rng_state=_set_state))
        # megatron-core 0.16.1 asks a router for it, but defines it where there is Transformer Engine only.
        stack.enter_context(mock.patch.object(moe_utils, "te_general_gemm", None, create=True))
        stack.enter_context(mock.patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", _to_host))
        stack.enter_context(mock.patch.object(torch.nn.Module, "cuda", _module_on_cpu))
        stack.enter_context(CudaIsTheCpu())
        _depth += 1
        try:
            yield
        finally:
            _depth -= 1


def inside(method: Callable) -> Callable:
    """Returns a method that runs in ``cuda_is_the_cpu``."""

    @functools.wraps(method)
    def on_the_cpu(*args: Any, **kwargs: Any) -> Any:
        with cuda_is_the_cpu():
            return method(*args, **kwargs)

    return on_the_cpu
