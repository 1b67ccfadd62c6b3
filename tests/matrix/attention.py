# SPDX-License-Identifier: Apache-2.0
"""Stands in for flash-attention on packed sequences, so that verl's Ulysses, which wraps it, runs without a GPU."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations import flash_attention
from transformers.masking_utils import flash_attention_mask
from verl.models.transformers import monkey_patch

NAME = "packed_sequences_in_torch"


def install() -> None:
    """Registers the attention ``NAME`` and gives it to verl, whose own function exchanges heads and calls this one."""
    AttentionInterface.register(NAME, flash_attention.flash_attention_forward)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    monkey_patch._flash_attention_forward = attention_of_sequences


def attention_of_sequences(
    query: Tensor, key: Tensor, value: Tensor, mask: Any, length: int, *args: Any, position_ids: Tensor, **kwargs: Any
) -> Tensor:
    """(1, length, heads, size): causal attention within each packed sequence, which begins at position 0."""
    assert mask is None
    sequence = (position_ids[0] == 0).cumsum(0)
    place = torch.arange(len(sequence))
    seen = (sequence[:, None] == sequence[None]) & (place[:, None] >= place[None])
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    repeats = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(repeats, 1) for tensor in (key, value))
    scale = kwargs.get("softmax_scale")
    return scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale).transpose(1, 2)
