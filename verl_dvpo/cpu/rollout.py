# SPDX-License-Identifier: Apache-2.0
"""``actor_rollout_ref.rollout.name=vllm_cpu``: verl's vLLM server and adapter around vLLM's CPU engine."""

from typing import Any

import ray
from verl.workers.rollout.vllm_rollout import ServerAdapter
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica

__all__ = ["CPUServerAdapter", "VLLMCPUReplica"]


class CPUServerAdapter(ServerAdapter):
    """The trainer's side of the weight transfer; the names of the server's actors carry the rollout's name."""


class VLLMCPUHttpServer(vLLMHttpServer):
    """verl's server with a worker extension that can load weights into CPU layers."""

    def _get_worker_extension_cls(self) -> str:
        return "verl_dvpo.cpu.vllm_worker.CPUWorkerExtension"

    def _get_engine_kwargs_key(self) -> str:
        return "vllm"


class VLLMCPUReplica(vLLMReplica):
    """verl's replica, launching :class:`VLLMCPUHttpServer`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(VLLMCPUHttpServer)

    def _get_server_name_prefix(self) -> str:
        return "vllm_cpu_"
