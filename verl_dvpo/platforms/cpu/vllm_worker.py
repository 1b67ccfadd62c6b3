# SPDX-License-Identifier: Apache-2.0
"""Weight updates for vLLM's CPU layers."""

from typing import Any

import torch
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver
from verl.workers.rollout.vllm_rollout.utils import VLLM_LORA_INT_ID, vLLMColocateWorkerExtension

from verl_dvpo.platforms.cpu.loopback import among_own_files


class CPUWorkerExtension(vLLMColocateWorkerExtension):
    """Receives all buckets, then lets vLLM reload them layer by layer.

    vLLM 0.31's CPU linear layers repack their weights after loading and drop the parameters that know how to load,
    so ``model.load_weights`` on a live model fails; ``reload_weights`` restores them first and repacks afterwards.
    """

    # What vLLM's worker brings, into which this class is mixed.
    model_runner: Any
    remove_lora: Any

    def _get_zmq_handle(self) -> str:
        return among_own_files(super()._get_zmq_handle())

    def update_weights_from_ipc(
        self, peft_config: dict[str, Any] | None = None, base_sync_done: bool = False, use_shm: bool = False
    ) -> None:
        receiver = BucketedWeightReceiver(
            zmq_handle=self._get_zmq_handle(), device=torch.device("cpu"), use_shm=use_shm
        )
        received: list[tuple[str, torch.Tensor]] = []

        def keep(weights: list[tuple[str, torch.Tensor]], is_last: bool) -> None:
            # Copies: on the CPU `.to(device)` returns views of the shared memory, which the receiver then closes.
            received.extend((name, weight.clone()) for name, weight in weights)

        receiver.receive_weights(on_bucket_received=keep)
        if peft_config and base_sync_done:
            self.remove_lora(VLLM_LORA_INT_ID)
            self._update_weights(received, peft_config=peft_config, base_sync_done=base_sync_done)
            return
        self.model_runner.reload_weights(weights_iterator=iter(received))
