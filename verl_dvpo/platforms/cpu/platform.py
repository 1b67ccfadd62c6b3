# SPDX-License-Identifier: Apache-2.0
"""Adds the CPU to verl's platforms."""

import contextlib
import os
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


def _device_module() -> types.SimpleNamespace:
    """Adds to ``torch.cpu`` the calls that verl makes on ``torch.cuda``: memory figures are 0, streams do nothing."""

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    return types.SimpleNamespace(
        **{name: getattr(torch.cpu, name) for name in ("synchronize", "is_available", "Stream", "stream")},
        current_stream=torch.cpu.current_stream,
        current_device=lambda: torch.device("cpu"),
        device_count=lambda: 1,
        set_device=nothing,
        empty_cache=nothing,
        ipc_collect=nothing,
        reset_peak_memory_stats=nothing,
        manual_seed=torch.manual_seed,
        manual_seed_all=torch.manual_seed,
        get_rng_state=torch.get_rng_state,
        set_rng_state=torch.set_rng_state,
        memory_allocated=lambda *args, **kwargs: 0,
        max_memory_allocated=lambda *args, **kwargs: 0,
        memory_reserved=lambda *args, **kwargs: 0,
        max_memory_reserved=lambda *args, **kwargs: 0,
        mem_get_info=lambda *args, **kwargs: (0, 0),
        get_device_name=lambda *args, **kwargs: "cpu",
        memory=types.SimpleNamespace(_set_allocator_settings=nothing),
    )


def asked_for(arguments: Sequence[str]) -> bool:
    """Tells whether a process is to run on this platform, before it has composed its configuration.

    Args:
        arguments: of its command line.
    """
    by_name = os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"
    return by_name or any(argument.lstrip("+") == "platform=cpu" for argument in arguments)


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """Implements verl's platform interface on plain memory; Ray's resource ``GPU`` is a logical number.

    verl detects it only where it is asked for, by ``VERL_PLATFORM`` or by ``platform=cpu`` on the command line: a
    driver on the head node of a GPU cluster has no accelerator either.
    """

    def __init__(self) -> None:
        self._module = _device_module()

    device_name = "cpu"
    vendor_name = "cpu"

    @property
    def device_module(self) -> Any:
        return self._module

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return asked_for(sys.argv[1:])

    def current_device(self) -> Any:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        return None

    def synchronize(self, device_index: int | None = None) -> None:
        return None

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        return None

    def empty_cache(self) -> None:
        return None

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextlib.contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        return None

    def profiler_stop(self) -> None:
        return None

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_resource_options(self, num_gpus: float) -> dict[str, Any]:
        return {"num_gpus": num_gpus}

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False

    def rollout_env_vars(self) -> dict[str, str]:
        return {}

    def cudart(self) -> Any:
        return None
