# SPDX-License-Identifier: Apache-2.0
"""A tiny model with a tokenizer of characters, and an exported critic of it, without a worker."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from verl_dvpo import ValueModel
from verl_dvpo.families.registry import family_settings

LETTERS = "0123456789abcdefghijklmnopqrstuvwxyz+=? "
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"


def save_base(folder: Path) -> Path:
    """A two-layer Qwen3 of fixed random weights."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(LETTERS) + 1, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    vocabulary = {letter: number for number, letter in enumerate(LETTERS)} | {"<pad>": len(LETTERS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="?")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return folder


def save_critic(folder: Path, base: Path, family: str = "quantile_ensemble", **settings) -> Path:
    """An exported critic with a first head."""
    sizes = {"num_heads": 2, "num_quantiles": 5} if family == "quantile_ensemble" else {}
    model = ValueModel.build(base, family_settings(family, **{**sizes, **settings}))
    model.save_pretrained(folder, tokenizer=base, facts={"base_model": "tiny"})
    return folder
