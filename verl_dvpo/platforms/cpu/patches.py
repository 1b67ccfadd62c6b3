# SPDX-License-Identifier: Apache-2.0
"""Changes of verl that only the CPU needs; ``verl_dvpo.compat`` applies them where VERL_PLATFORM=cpu."""

import dataclasses
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

from verl_dvpo.platforms.cpu.loopback import meet_at_a_file

THREADS_ENV = "VERL_DVPO_CPU_THREADS"


def join_gloo(original: Callable[..., None]) -> Callable[..., None]:
    """Lets a training process join plain gloo, with the number of threads in VERL_DVPO_CPU_THREADS.

    By default verl asks for the backend ``cpu:gloo,<device>:<backend>``, which names the CPU twice here and is refused
    by torch. The function has a parameter for the backend, but ``TrainingWorker`` does not pass one. Ray gives each
    worker one thread by its environment; ours replaces that for training processes only. They meet on this machine, see
    ``loopback``.
    """

    def initialize(timeout_second: int | None = None, backend: str | None = None) -> None:
        import torch

        if threads := os.environ.get(THREADS_ENV):
            torch.set_num_threads(int(threads))
        meet_at_a_file()
        original(timeout_second=timeout_second, backend=backend or "gloo")

    return initialize


def whole_batch_log_probs(original: Callable[..., Any]) -> Callable[..., Any]:
    """Computes the log-probabilities of labels in one call.

    Where there is no flash-attention, verl takes a row of logits at a time to save memory; for a small vocabulary those
    calls cost as much as the model's forward pass.
    """
    import torch

    def log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="none"
        )
        return -losses.view(labels.shape)

    return log_probs


def skip_single_partitions(original: Callable[..., list[list[int]]]) -> Callable[..., list[list[int]]]:
    """Puts everything, in order, into the partition where there is only one.

    verl runs the Karmarkar-Karp heuristic for that too, for the batch and again for each pass with dynamic batch sizes.
    """

    def partitions(seqlen_list: Any, k_partitions: int, equal_size: bool) -> list[list[int]]:
        if k_partitions == 1 and len(seqlen_list) > 0:
            return [list(range(len(seqlen_list)))]
        return original(seqlen_list, k_partitions, equal_size)

    return partitions


def saved_copies(original: Callable[..., tuple[dict[str, Any], Any]]) -> Callable[..., tuple[dict[str, Any], Any]]:
    """Copies the parameters that verl saves, to compute with an older policy and then go on with the present one.

    ``trainer_mode=separate_async`` with ``parameter_sync_step`` above 1 does so for the old log-probabilities.
    """

    def save(model: Any) -> tuple[dict[str, Any], Any]:
        state, spec = original(model)
        return {name: (tensor.clone(), own) for name, (tensor, own) in state.items()}, spec

    return save


def register_engines(fsdp: ModuleType) -> None:
    """Registers verl's FSDP2 engines for the CPU, without their CPU offload.

    verl registers its engines for cuda and npu. FSDP1 cannot run here: it broadcasts a module's first state over an
    accelerator's backend only.
    """
    from verl.workers.engine.base import EngineRegistry

    for model_type, engine in (
        ("language_model", fsdp.FSDPEngineWithLMHead),
        ("value_model", fsdp.FSDPEngineWithValueHead),
    ):
        EngineRegistry.register(model_type=model_type, backend="fsdp2", device="cpu")(without_offload(engine))


def without_offload(engine: Any) -> Any:
    """Derives from ``engine`` a class without FSDP2's CPU offload, which pins memory for an accelerator.

    verl asks for that offload for every reference policy.
    """

    class CPUEngine(engine):
        engine_config: Any

        def _build_fsdp_module(self, module: Any) -> Any:
            config = self.engine_config
            self.engine_config = dataclasses.replace(config, forward_only=False, offload_policy=False)
            try:
                return super()._build_fsdp_module(module)
            finally:
                self.engine_config = config

    CPUEngine.__name__ = CPUEngine.__qualname__ = f"CPU{engine.__name__}"
    return CPUEngine
