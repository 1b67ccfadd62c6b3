# SPDX-License-Identifier: Apache-2.0
"""Builds the tasks' model: a Qwen3 causal LM of under a million parameters."""

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from verl_dvpo.bench.tasks.registry import ModelSize

#: The smallest that vLLM's CPU attention supports.
HEAD_DIM = 32
DEFAULT_SIZE = ModelSize()


def build_config(tokenizer: PreTrainedTokenizerFast, size: ModelSize = DEFAULT_SIZE) -> Qwen3Config:
    """Returns the architecture; it has room for as many tokens as the tokenizer declares (``model_max_length``)."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_key_value_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=tokenizer.model_max_length,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        use_cache=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, size: ModelSize = DEFAULT_SIZE, *, seed: int) -> Qwen3ForCausalLM:
    """Returns a freshly initialised model in float32; the caller's random state does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(build_config(tokenizer, size))
    assert model.generation_config is not None
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.float()
