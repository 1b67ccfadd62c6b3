# SPDX-License-Identifier: Apache-2.0
"""The same two updates for a worker on any engine, and what is seen of them. Imports nothing of Megatron."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from transformers import Qwen3Config, Qwen3ForCausalLM
from verl.utils import tensordict_utils as tu

from critic import harness

#: What a mini-batch needs beside its tensors where no worker adds it.
PLAIN = {
    "use_dynamic_bsz": False,
    "micro_batch_size_per_gpu": 2,
    "max_token_len_per_gpu": 64,
    "use_remove_padding": True,
    "use_fused_kernels": False,
    "compute_loss": False,
    "temperature": 1.0,
}


def save_model(folder: Path) -> str:
    """Four layers and two key-value heads, which two stages, two virtual ones and two ranks can share; random norms."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=harness.VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.1)
            if "norm" in name:
                parameter.add_(1.0)
    model.save_pretrained(folder, max_shard_size="20KB")  # several files, as large models have
    return str(folder)


def two_updates(worker: Any, batch: TensorDict, capture: Callable[[Any], dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Returns raw outputs, the values and metrics of two updates, the first one's gradients, and dtypes."""
    for group in worker.engine.optimizer.param_groups:
        # A gradient of rounding errors alone makes a whole step of Adam where its epsilon is small.
        group["eps"], group["weight_decay"] = 1e-3, 0.0
    seen: dict[str, Any] = {"raw": raw_outputs(worker, batch), "values": [], "metrics": []}
    gradients = capture(worker)
    for step in (1, 2):
        inferred = harness.infer(worker, batch)
        seen["values"].append(None if inferred is None else inferred["values"].values())
        trained = harness.update(worker, batch, step=step)
        seen.setdefault("gradients", dict(gradients))
        seen["metrics"].append(None if trained is None else tu.get(trained, "metrics"))
    return seen


def raw_outputs(worker: Any, batch: TensorDict) -> torch.Tensor | None:
    """(response tokens, D) on ranks that have outputs, before any decoding."""
    reader, worker.engine.reader = worker.engine.reader, None
    data = batch.clone()
    tu.assign_non_tensor(data, **PLAIN)
    with worker.engine.eval_mode():
        output = worker.engine.infer_batch(data)
    worker.engine.reader = reader
    return output["model_output"]["outputs"].values().detach().clone() if output else None
