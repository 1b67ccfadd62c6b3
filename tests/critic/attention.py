# SPDX-License-Identifier: Apache-2.0
"""Stands in for the kernel of flash-attention, which has none for a CPU. verl's Ulysses runs around it as it is."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, modeling_utils
from transformers.integrations import flash_attention
from verl.models.transformers import monkey_patch

#: For ``attn_implementation``.
NAME = "flash_attention_of_tests"


def register() -> None:
    """Adds the attention to transformers' in this process; where flash-attention's kernel is called, ours is."""
    AttentionInterface.register(NAME, flash_attention.flash_attention_forward)
    modeling_utils.lazy_import_flash_attention = lambda name: None  # it looks for a package of that name
    monkey_patch._flash_attention_forward = _kernel


def _kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    query_length: int,
    *,
    position_ids: Tensor,
    softmax_scale: float,
    **settings: Any,
) -> Tensor:
    """Attends causally within each of the packed sequences, (1, L, heads, width); each begins at position 0."""
    assert attention_mask is None
    sequence = (position_ids == 0).cumsum(-1)[0]
    places = torch.arange(query_length)
    seen = (sequence[:, None] == sequence[None]) & (places[:, None] >= places[None])
    heads = [each.transpose(1, 2) for each in (query, key, value)]
    attended = scaled_dot_product_attention(*heads, attn_mask=seen, scale=softmax_scale, enable_gqa=True)
    return attended.transpose(1, 2)
