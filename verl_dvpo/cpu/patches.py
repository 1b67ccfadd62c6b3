# SPDX-License-Identifier: Apache-2.0
"""What verl has no extension point for. ``verl_dvpo.plugin`` calls these only where VERL_PLATFORM=cpu."""

import functools
import os
from types import ModuleType
from typing import Any

THREADS_ENV = "VERL_DVPO_CPU_THREADS"


def use_gloo(distributed: Any) -> None:
    """Lets a training process join plain gloo.

    verl/utils/distributed.py, line 89 of 0.9.1, asks for the backend ``cpu:gloo,<device>:<backend>``, which names
    the CPU twice here and is refused by torch. The function has a parameter for the backend, but its callers in
    verl/workers/engine_workers.py do not pass one. Ray gives each worker one thread by its environment; the number
    in VERL_DVPO_CPU_THREADS replaces that for training processes only.
    """
    original = distributed.initialize_global_process_group_ray

    @functools.wraps(original)
    def initialize(timeout_second: int | None = None, backend: str | None = None) -> None:
        import torch

        if threads := os.environ.get(THREADS_ENV):
            torch.set_num_threads(int(threads))
        original(timeout_second=timeout_second, backend=backend or "gloo")

    distributed.initialize_global_process_group_ray = initialize


def register_engines(fsdp: ModuleType) -> None:
    """verl registers its FSDP engines for cuda and npu; FSDP2's run unchanged on the CPU.

    FSDP1 does not: it broadcasts a module's first state over an accelerator's backend only.
    """
    from verl.workers.engine.base import EngineRegistry

    for model_type, engine in (
        ("language_model", fsdp.FSDPEngineWithLMHead),
        ("value_model", fsdp.FSDPEngineWithValueHead),
    ):
        EngineRegistry.register(model_type=model_type, backend="fsdp2", device="cpu")(engine)
