# SPDX-License-Identifier: Apache-2.0
"""Tiny random backbones of several architectures, two layers each, on the vocabulary of the harness."""

from pathlib import Path
from typing import Any

import torch
import transformers

from critic.harness import VOCABULARY

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: Tokens that a vision-language model reads as parts of an image, past the vocabulary of text.
IMAGE, VIDEO, IMAGE_BEGINS, IMAGE_ENDS = range(VOCABULARY, VOCABULARY + 4)
PATCH, MERGE = 2, 2
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": PATCH}
VISION |= {"spatial_merge_size": MERGE, "temporal_patch_size": 2, "out_hidden_size": 16}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": IMAGE_BEGINS,
    "vision_end_token_id": IMAGE_ENDS,
}

#: Name -> (configuration, model that is saved, settings).
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": False}),
    # A window shorter than the sequences, so that a mask that forgets it would show.
    "mistral": ("MistralConfig", "MistralForCausalLM", {"tie_word_embeddings": False, "sliding_window": 3}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "tie_word_embeddings": False},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
            "tie_word_embeddings": False,
        },
    ),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4, "tie_word_embeddings": False}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {"sliding_window": 3, "query_pre_attn_scalar": 8}),
    # transformers has no token classifier for it, so the head sits on the bare backbone.
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"sliding_window": 3, "query_pre_attn_scalar": 8}),
    "qwen3_vl": (
        "Qwen3VLConfig",
        "Qwen3VLForConditionalGeneration",
        {
            **TOKENS,
            "text_config": {
                **SIZES,
                "vocab_size": VOCABULARY + 4,
                "rope_parameters": {**ROPE, "mrope_interleaved": True},
            },
            "vision_config": {**VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        "Qwen2_5_VLForConditionalGeneration",
        {
            **TOKENS,
            "text_config": {**SIZES, "vocab_size": VOCABULARY + 4, "rope_parameters": ROPE},
            "vision_config": {**VISION, "window_size": 8, "fullatt_block_indexes": [0]},
        },
    ),
}


def save(folder: Path, name: str, **changes: Any) -> str:
    """Writes the model ``name`` with ``changes`` of its configuration, every weight drawn wide enough to matter."""
    config_name, model_name, settings = MODELS[name]
    sizes = {} if "text_config" in settings else SIZES
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**{**sizes, **settings, **changes})
    model = getattr(transformers, model_name)(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)
    return str(folder)
