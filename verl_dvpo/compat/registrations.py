# SPDX-License-Identifier: Apache-2.0
"""Adds names of ours to registries of verl that take a name, not a class."""

from typing import Any


def cpu_rollout_adapter(base: Any) -> None:
    """Registers the trainer's side of the rollout ``vllm_cpu``."""
    base._ROLLOUT_REGISTRY[("vllm_cpu", "async")] = "verl_dvpo.platforms.cpu.rollout.CPUServerAdapter"


def cpu_rollout_replica(replica: Any) -> None:
    """Registers the server's side of the rollout ``vllm_cpu``."""

    def load() -> type:
        from verl_dvpo.compat.apply import resolve

        return resolve("verl_dvpo.platforms.cpu.rollout:VLLMCPUReplica")

    replica.RolloutReplicaRegistry.register("vllm_cpu", load)
