# SPDX-License-Identifier: Apache-2.0
"""A real critic worker on verl's Megatron engine, on the CPU and over gloo, without Ray."""

import os
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from verl.trainer.config import CheckpointConfig
from verl.workers.config import McoreOptimizerConfig, TrainingWorkerConfig
from verl.workers.utils.losses import value_loss

from verl_dvpo.critic.config import ValueModelConfig, family_config
from verl_dvpo.critic.megatron_bridge import without_output_layers
from verl_dvpo.critic.megatron_config import DistributionalMegatronCriticConfig, MegatronEngineConfig
from verl_dvpo.critic.worker import DistributionalCriticWorker


class Tokenizer:
    """All that verl's engine asks of a tokenizer."""

    pad_token_id = 0


def join(rank: int, world_size: int, port: int) -> None:
    """Makes this process one rank of a gloo group."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RAY_LOCAL_WORLD_SIZE=str(world_size),
    )
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)


def make_worker(
    model: str,
    *,
    value: dict[str, Any],
    packed: bool = True,
    dtype: str = "float32",
    use_dynamic_bsz: bool = False,
    saved: tuple[str, ...] = ("model", "optimizer"),
    **megatron: Any,
) -> DistributionalCriticWorker:
    """The worker that the trainer would start; the parallel layout may differ from the last worker's."""
    parallel_state.destroy_model_parallel()
    engine_config = MegatronEngineConfig(
        vanilla_mbridge=True,
        micro_batch_size_per_gpu=2,
        infer_micro_batch_size_per_gpu=2,
        max_token_len_per_gpu=64,
        infer_max_token_len_per_gpu=64,
        dtype=dtype,
        use_dynamic_bsz=use_dynamic_bsz,
        **megatron,
    )
    optimizer = McoreOptimizerConfig(
        lr=1e-2, clip_grad=1e9, total_training_steps=10, lr_warmup_steps=0, weight_decay=0.0
    )
    critic = DistributionalMegatronCriticConfig(
        megatron=engine_config,
        model=ValueModelConfig(path=model, load_tokenizer=False, use_remove_padding=packed),
        optim=optimizer,
        value=family_config(**value),
        ppo_micro_batch_size_per_gpu=2,
    )
    worker = DistributionalCriticWorker(
        TrainingWorkerConfig(
            model_type="value_model",
            model_config=critic.model,
            engine_config=critic.engine,
            optimizer_config=optimizer,
            checkpoint_config=CheckpointConfig(save_contents=list(saved), load_contents=list(saved)),
        )
    )
    worker.reset()
    worker.model_config.tokenizer = Tokenizer()
    worker.set_loss_fn(partial(value_loss, config=critic))
    return worker


def capture_gradients(worker: DistributionalCriticWorker) -> dict[str, torch.Tensor]:
    """Filled with the gradients of the next optimizer step, whole and under the names of the FSDP critic."""
    gradients: dict[str, torch.Tensor] = {}
    step = worker.engine.optimizer_step

    def capture() -> Any:
        modules = worker.engine.module
        for module in modules:
            gather_gradients(module)
        parameters = [parameter for module in modules for parameter in module.parameters()]
        weights = [parameter.data for parameter in parameters]
        for parameter in parameters:
            parameter.data = parameter.main_grad.clone()
        gradients.update(named_weights(worker))
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.data = weight
        return step()

    worker.engine.optimizer_step = capture
    return gradients


def gather_gradients(module: Any) -> None:
    """Fills each gradient buffer: after a reduce-scatter a rank holds its own part of the sum only."""
    group = parallel_state.get_data_parallel_group()
    if not module.ddp_config.use_distributed_optimizer or group.size() == 1:
        return
    for buffer in module.buffers:
        for bucket in buffer.buckets:
            parts = list(bucket.grad_data.chunk(group.size()))
            torch.distributed.all_gather(parts, parts[group.rank()].clone(), group=group)


def named_weights(worker: DistributionalCriticWorker) -> dict[str, torch.Tensor]:
    """All weights under Hugging Face's names on every rank, and the head's as ``score.*`` on the last stage."""
    engine = worker.engine
    with without_output_layers(engine.module):
        named = {name: tensor.detach().float().clone() for name, tensor in engine.bridge.export_weights(engine.module)}
    for chunk in unwrap_model(engine.module):
        if chunk.post_process:
            named |= {f"score.{name}": tensor.clone() for name, tensor in chunk.output_layer.plain_state().items()}
    return named


def optimizer_states(worker: DistributionalCriticWorker) -> dict[str, dict[str, torch.Tensor]]:
    """Name of a parameter -> this rank's part of its fp32 copy and moments, as megatron-core saves them."""
    chunks = enumerate(worker.engine.module)
    names = {parameter: f"{number}.{name}" for number, chunk in chunks for name, parameter in chunk.named_parameters()}
    return {
        names[parameter]: {
            key: state.clone() for key, state in part._get_main_param_and_optimizer_states(parameter).items()
        }
        for part in worker.engine.optimizer.chained_optimizers
        for parameter in part.model_param_group_index_map
    }
