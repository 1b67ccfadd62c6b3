# SPDX-License-Identifier: Apache-2.0
"""What verl has no extension point for. ``verl_dvpo.plugin`` calls these only where VERL_PLATFORM=cpu."""

import dataclasses
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


def use_whole_batch_log_probs(torch_functional: ModuleType) -> None:
    """Log-probabilities of labels in one call.

    verl/utils/torch_functional.py, line 197 of 0.9.1, takes a row of logits at a time where there is no
    flash-attention, to save memory; for a small vocabulary those calls cost as much as the model's forward pass.
    """
    import torch

    def log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="none"
        )
        return -losses.view(labels.shape)

    torch_functional.logprobs_from_logits_v2 = log_probs  # type: ignore[attr-defined]


def skip_single_partitions(seqlen_balancing: ModuleType) -> None:
    """One partition holds everything, in order.

    verl/utils/seqlen_balancing.py, line 253 of 0.9.1, runs the Karmarkar-Karp heuristic for that too: for 256
    sequences 0.05 s, for the batch and again for each pass with dynamic batch sizes.
    """
    original = seqlen_balancing.get_seqlen_balanced_partitions

    @functools.wraps(original)
    def partitions(seqlen_list: Any, k_partitions: int, equal_size: bool) -> list[list[int]]:
        if k_partitions == 1 and len(seqlen_list) > 0:
            return [list(range(len(seqlen_list)))]
        return original(seqlen_list, k_partitions, equal_size)

    seqlen_balancing.get_seqlen_balanced_partitions = partitions  # type: ignore[attr-defined]


def register_engines(fsdp: ModuleType) -> None:
    """verl registers its FSDP engines for cuda and npu; FSDP2's run on the CPU but for one thing, see below.

    FSDP1 does not: it broadcasts a module's first state over an accelerator's backend only.
    """
    from verl.workers.engine.base import EngineRegistry

    for model_type, engine in (
        ("language_model", fsdp.FSDPEngineWithLMHead),
        ("value_model", fsdp.FSDPEngineWithValueHead),
    ):
        EngineRegistry.register(model_type=model_type, backend="fsdp2", device="cpu")(without_offload(engine))


def without_offload(engine: Any) -> Any:
    """``engine`` without FSDP2's CPU offload, which pins memory for an accelerator that is not there.

    verl asks for it for every reference policy (transformer_impl.py, line 462 of 0.9.1).
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
