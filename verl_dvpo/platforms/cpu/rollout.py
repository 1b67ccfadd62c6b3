# SPDX-License-Identifier: Apache-2.0
"""``actor_rollout_ref.rollout.name=vllm_cpu``: verl's vLLM server and adapter around vLLM's CPU engine."""

import asyncio
import os
from typing import Any

import ray
from verl.workers.rollout.vllm_rollout import ServerAdapter
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica
from vllm.sampling_params import RequestOutputKind

from verl_dvpo.compat.apply import apply_in_this_process
from verl_dvpo.compat.entry import Moment
from verl_dvpo.platforms.cpu.loopback import among_own_files

__all__ = ["CPUServerAdapter", "VLLMCPUReplica"]


def job_name() -> str:
    """Names this job among all Ray clusters of the machine.

    verl names the socket of the weight transfer by Ray's job id. Every cluster counts its jobs from 1, so two runs side
    by side, each on a Ray of its own, would meet at one socket and hang, or sample from each other's weights.
    """
    context = ray.get_runtime_context()
    return f"{context.get_job_id()}-{context.gcs_address.rpartition(':')[2]}"


class CPUServerAdapter(ServerAdapter):
    """Names the socket on the trainer's side of the weight transfer by `job_name`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.zmq_handle = among_own_files(self.zmq_handle).replace(ray.get_runtime_context().get_job_id(), job_name())


class VLLMCPUHttpServer(vLLMHttpServer):
    """Runs verl's server with a worker extension that can load weights into CPU layers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        apply_in_this_process(Moment.ROLLOUT_SERVER)
        os.environ["VERL_RAY_JOB_ID"] = job_name()  # the engine's process, which has no Ray, takes it from here

    async def generate_many(self, requests: list[dict[str, Any]]) -> list[Any]:
        """Answers requests together; each result is what ``generate`` returns for it, or the exception that it raises.

        Args:
            requests: arguments of ``generate``, one dictionary a request.
        """
        for request in requests:
            sampling: dict[str, Any] = request["sampling_params"]
            sampling.setdefault("output_kind", RequestOutputKind.FINAL_ONLY)
            if not sampling.get("stop"):  # vLLM looks for strings in the text
                sampling.setdefault("detokenize", False)
        return await asyncio.gather(*(self.generate(**request) for request in requests), return_exceptions=True)

    def _get_worker_extension_cls(self) -> str:
        return "verl_dvpo.platforms.cpu.vllm_worker.CPUWorkerExtension"

    def _get_engine_kwargs_key(self) -> str:
        return "vllm"


class VLLMCPUReplica(vLLMReplica):
    """Launches `VLLMCPUHttpServer`; the names of the server's actors carry the rollout's name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(VLLMCPUHttpServer)

    def _get_server_name_prefix(self) -> str:
        return "vllm_cpu_"
