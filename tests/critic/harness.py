# SPDX-License-Identifier: Apache-2.0
"""A real critic worker in this process (FSDP over gloo, a two-layer Qwen3), without Ray."""

import os
import socket
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from transformers import Qwen3Config, Qwen3ForCausalLM
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, TrainingWorkerConfig
from verl.workers.utils.losses import value_loss

from verl_dvpo.critic.config import DistributionalFSDPCriticConfig, ValueModelConfig, family_config
from verl_dvpo.critic.worker import DistributionalCriticWorker

VOCABULARY = 32
FP32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}


def free_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def save_model(folder: Path, *, architecture: type = Qwen3ForCausalLM, **changes: Any) -> str:
    """A tiny backbone with fixed random weights."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        **changes,
    )
    architecture(config).save_pretrained(folder)
    return str(folder)


def make_worker(
    model: str,
    *,
    rank: int = 0,
    world_size: int = 1,
    port: int | None = None,
    strategy: str = "fsdp2",
    mixed_precision: dict | None = None,
    value: dict[str, Any] | None = None,
    engine: dict[str, Any] | None = None,
    critic: dict[str, Any] | None = None,
    attention: str = "sdpa",
    **model_settings: Any,
) -> DistributionalCriticWorker:
    """The worker that the trainer would start, with its loss set as the trainer sets it."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port or free_port()),
        RAY_LOCAL_WORLD_SIZE=str(world_size),
    )
    settings = {"family": "quantile_ensemble", "num_heads": 2, "num_quantiles": 5, **(value or {})}
    settings = {name: value for name, value in settings.items() if value is not None}
    model_config = ValueModelConfig(
        path=model,
        load_tokenizer=False,
        **{
            "override_config": {"attn_implementation": attention},
            "use_remove_padding": True,
            "enable_gradient_checkpointing": False,
            **model_settings,
        },
    )
    engine_config = FSDPEngineConfig(
        strategy=strategy,
        mixed_precision=mixed_precision or FP32,
        model_dtype="fp32",
        use_torch_compile=False,
        **{
            "micro_batch_size_per_gpu": 2,
            "infer_micro_batch_size_per_gpu": 2,
            "max_token_len_per_gpu": 64,
            "infer_max_token_len_per_gpu": 64,
            "use_dynamic_bsz": False,
            **(engine or {}),
        },
    )
    critic_config = DistributionalFSDPCriticConfig(
        strategy=strategy,
        fsdp=engine_config,
        model=model_config,
        value=family_config(**settings),
        ppo_micro_batch_size_per_gpu=2,
        **(critic or {}),
    )
    config = TrainingWorkerConfig(
        model_type="value_model",
        model_config=critic_config.model,
        engine_config=critic_config.engine,
        optimizer_config=FSDPOptimizerConfig(lr=1e-2, clip_grad=1e9, total_training_steps=10, lr_warmup_steps=0),
        checkpoint_config=CheckpointConfig(save_contents=["model", "optimizer", "extra"]),
    )
    from functools import partial

    worker = DistributionalCriticWorker(config)
    worker.reset()
    worker.set_loss_fn(partial(value_loss, config=critic_config))
    return worker


def jagged(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def make_batch(*, rows: slice = slice(None), seed: int = 0, size: int = 8) -> TensorDict:
    """Sequences of ragged lengths as the trainer stores them: some tokens masked inside, one row masked whole."""
    rng = torch.Generator().manual_seed(seed)
    fields: dict[str, list[torch.Tensor]] = {
        name: []
        for name in ("input_ids", "position_ids", "prompts", "responses", "response_mask", "loss_mask", "rm_scores")
    }
    for index in range(size):
        prompt = torch.randint(0, VOCABULARY, (int(torch.randint(1, 5, (1,), generator=rng)),), generator=rng)
        length = int(torch.randint(1, 9, (1,), generator=rng))
        response = torch.randint(0, VOCABULARY, (length,), generator=rng)
        mask = torch.ones(length, dtype=torch.int64)
        if length > 3:
            mask[1:3] = 0  # a tool's answer
        if index == 3:
            mask[:] = 0  # a padding row
        scores = torch.zeros(length)
        scores[-1] = torch.randn((), generator=rng)
        ids = torch.cat([prompt, response])
        for name, value in (
            ("input_ids", ids),
            ("position_ids", torch.arange(len(ids))),
            ("prompts", prompt),
            ("responses", response),
            ("response_mask", mask),
            ("loss_mask", mask),
            ("rm_scores", scores),
        ):
            fields[name].append(value)
    return tu.get_tensordict({name: jagged(values[rows]) for name, values in fields.items()})


def infer(worker: DistributionalCriticWorker, batch: TensorDict) -> TensorDict:
    data = batch.clone()
    tu.assign_non_tensor(data, compute_loss=False, temperature=1.0)
    return worker.infer_batch(data)


def train(worker: DistributionalCriticWorker, batch: TensorDict, **settings: Any) -> dict[str, Any]:
    """One update on the whole batch; returns its metrics."""
    return tu.get(update(worker, batch, **settings), "metrics")


def update(
    worker: DistributionalCriticWorker, batch: TensorDict, *, global_batch_size: int = 8, step: int = 1, **extra: Any
) -> TensorDict | None:
    """One update on the whole batch; returns what the trainer gets, nothing from a rank without outputs."""
    data = batch.clone()
    tu.assign_non_tensor(
        data,
        **{
            "global_batch_size": global_batch_size,
            "mini_batch_size": global_batch_size,
            "epochs": 1,
            "seed": 0,
            "dataloader_kwargs": {"shuffle": False},
            "temperature": 1.0,
            "gamma": 0.9,
            "lam": 0.8,
            "global_steps": step,
            **extra,
        },
    )
    return worker.train_mini_batch(data)


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def capture_gradients(worker: DistributionalCriticWorker) -> dict[str, torch.Tensor]:
    """Filled with the gradients of the next optimizer step, gathered over ranks."""
    gradients: dict[str, torch.Tensor] = {}
    step = worker.engine.optimizer_step

    def capture() -> float:
        for name, parameter in worker.engine.module.named_parameters():
            if parameter.grad is not None:
                gradients[name] = full(parameter.grad).clone()
        return step()

    worker.engine.optimizer_step = capture
    return gradients
