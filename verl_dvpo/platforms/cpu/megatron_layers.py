# SPDX-License-Identifier: Apache-2.0
"""Stands in for Transformer Engine: the modules that megatron-core's own layer spec cannot do without it."""

import re
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from torch import Tensor, nn
from torch.nn import functional as F

#: Megatron-core's names of the norms in a layer without Transformer Engine, which mbridge does not know.
ATTENTION_NORM = {"input_layernorm.weight": ["model.layers.{layer_number}.input_layernorm.weight"]}
MLP_NORM = {"pre_mlp_layernorm.weight": ["model.layers.{layer_number}.post_attention_layernorm.weight"]}

#: The end of the name of an expert's weight where each expert is a module.
EXPERT = re.compile(r"\.experts\.local_experts\.(\d+)\.(linear_fc[12]\.weight)$")


class RMSNorm(nn.Module):
    """An RMS norm that takes a part of the sequence; megatron-core's own refuses sequence parallelism."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * F.rms_norm(hidden.float(), (hidden.shape[-1],), eps=self.eps).to(hidden.dtype)


class Attention(nn.Module):
    """Causal attention, sequence by sequence where they are packed; megatron-core's own refuses packed ones."""

    def __init__(self, config: Any, *args: Any, softmax_scale: float | None = None, **kwargs: Any) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, packed_seq_params: Any = None, **__: Any
    ) -> Tensor:
        """(s, b, heads, width) each -> (s, b, heads * width); packed: without b."""
        if packed_seq_params is None:
            turned = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
            return self._attend(*turned).permute(2, 0, 1, 3).flatten(-2)
        lengths = packed_seq_params.cu_seqlens_q_padded.diff().tolist()
        pieces = zip(*(tensor.transpose(0, 1).split(lengths, dim=1) for tensor in (query, key, value)), strict=True)
        return torch.cat([self._attend(*piece) for piece in pieces], dim=1).transpose(0, 1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale, enable_gqa=True)


def use_local_layers(bridge: Any) -> None:
    """Makes mbridge's bridge build layers without Transformer Engine, and know their weights' names.

    Experts are computed one after another, since a grouped product needs a GPU.
    """
    bridge.config.moe_grouped_gemm = False

    def layer_spec(vp_stage: int | None = None) -> Any:
        bridge.has_vp_stage = True
        spec = get_gpt_decoder_block_spec(
            bridge.config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage
        )
        spec.layer_norm = RMSNorm
        for layer in spec.layer_specs:
            parts, attention = layer.submodules, layer.submodules.self_attention.submodules
            parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
            attention.core_attention = Attention
            attention.q_layernorm = attention.k_layernorm = RMSNorm if bridge.config.qk_layernorm else None
        return spec

    bridge._get_transformer_layer_spec = layer_spec
    bridge._OTHER_MAPPING = bridge._OTHER_MAPPING | ATTENTION_NORM
    bridge._MLP_MAPPING = MLP_NORM | bridge._MLP_MAPPING
    bridge._weight_name_mapping_mcore_local_to_global = with_grouped_experts(bridge)


def with_grouped_experts(bridge: Any) -> Callable:
    """Returns the bridge's map of names in which the experts of this rank have the names of grouped ones.

    mbridge knows the weights of grouped experts only: ``experts.linear_fc1.weight3`` is what one of several modules
    holds as ``experts.local_experts.3.linear_fc1.weight``.
    """
    original = bridge._weight_name_mapping_mcore_local_to_global

    def mapping(model: Any, consider_ep: bool = True) -> dict[str, str]:
        rank, size = bridge.mpu.ep_rank, bridge.mpu.ep_size
        first = rank * bridge.config.num_moe_experts // size if consider_ep and size > 1 else 0

        def grouped(match: re.Match) -> str:
            return f".experts.{match[2]}{first + int(match[1])}"

        names = original(model, consider_ep=False)
        return {local: EXPERT.sub(grouped, name) for local, name in names.items()}

    return mapping
