# SPDX-License-Identifier: Apache-2.0
"""The worst-case baseline: N scalar heads, of which the smallest is the value of a state.

Shapes: B sequences, T response positions, L tokens laid end to end, N heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from verl_dvpo.distributional.metrics import population_std
from verl_dvpo.distributional.returns import distributional_gae
from verl_dvpo.families.base import FamilyConfig, FamilyLoss, SampledFamily, move_to_value
from verl_dvpo.families.bounds import require_at_least, require_choice, require_integer
from verl_dvpo.families.registry import register_family
from verl_dvpo.families.scalar import clipped_squared_error

#: Which sequences a head learns from.
HEADS_SEE = ("all", "bootstrap", "shards")


@dataclass(frozen=True, kw_only=True)
class RobustBellmanConfig(FamilyConfig):
    """Settings of ``family: robust_bellman``.

    Attributes:
        num_heads: N >= 1.
        cliprange: >= 0, in units of reward; as in ``scalar``.
        heads_see: ``all``: every head learns from every sequence, so heads agree in the end and the minimum means
            little. ``bootstrap``: each head has a Poisson(1) weight of its own on each sequence. ``shards``: each
            prompt, with all its answers and in every update, belongs to one head.
    """

    meaning: ClassVar[tuple[str, ...]] = ("num_heads",)

    num_heads: int = 3
    cliprange: float = 0.5
    heads_see: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer("num_heads", self.num_heads, least=1)
        require_at_least("cliprange", self.cliprange, 0.0)
        require_choice("heads_see", self.heads_see, HEADS_SEE)


@register_family("robust_bellman")
class RobustBellmanFamily(SampledFamily):
    """V(s) = min_i V_i(s) is the actor's baseline and the bootstrap in the λ-return; every head is regressed on that.

    L = mean over heads of ½·w_i·``squared_error`` (PPO's, clipped around the head's own old value). w_i is the head's
    weight on the token's sequence, with mean 1; it is 1 with ``heads_see: all``. A baseline of [DVPO] and [DFPO],
    rebuilt: no formula was at hand. The weights are an online bootstrap (ours). With N = 1 and ``all`` or ``shards``
    it is ``scalar``, number for number.
    """

    Config = RobustBellmanConfig

    def __init__(self, config: RobustBellmanConfig) -> None:
        self.num_heads = self.num_outputs = self.num_kept = config.num_heads
        self.cliprange = config.cliprange
        self.heads_see = config.heads_see
        self.sees_prompts = config.heads_see == "shards"

    def value(self, outputs: Tensor) -> Tensor:
        """(..., N) -> (...): the smallest head."""
        return outputs.amin(-1)

    def head_values(self, outputs: Tensor) -> Tensor:
        """(..., N) -> (..., N)."""
        return outputs

    def samples(self, outputs: Tensor) -> Tensor:
        """(..., N) -> (..., 1): the smallest head."""
        return outputs.amin(-1, keepdim=True)

    def keep(self, outputs: Tensor) -> Tensor:
        """(..., N) -> (..., N): every head, because each is clipped around its own old value."""
        return outputs

    def values_from_kept(self, kept: Tensor) -> Tensor:
        """(..., N) -> (...): the smallest head."""
        return kept.amin(-1)

    def build_targets(
        self,
        kept: Tensor,
        rewards: Tensor,
        mask: Tensor,
        *,
        gamma: float,
        lam: float,
        generator: torch.Generator | None = None,
        prompts: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Returns ``returns`` (B, T, 1), the λ-return (arXiv 1506.02438) on the minimum, and ``values`` (B, T, N).

        Unless every head sees all, also ``weights`` (B, T, N), equal along T. ``shards`` gives the prompt with key n
        to head n mod N, with weight N; without ``prompts`` (B,) rows are counted instead.
        """
        returns, _ = distributional_gae(rewards, self.samples(kept), mask, gamma=gamma, lam=lam)
        built = {"returns": returns, "values": kept}
        if self.heads_see != "all":
            built["weights"] = self._weights(kept, generator, prompts).unsqueeze(1).expand_as(kept)
        return built

    def _weights(self, kept: Tensor, generator: torch.Generator | None, prompts: Tensor | None) -> Tensor:
        """(B, T, N) -> (B, N): each head's weight on each sequence; every column has mean 1 over many prompts."""
        if self.heads_see == "bootstrap":
            return torch.poisson(kept.new_ones(kept.shape[0], self.num_heads), generator=generator)
        if prompts is None:
            prompts = torch.arange(kept.shape[0], device=kept.device)
        owner = torch.nn.functional.one_hot(prompts.to(kept.device) % self.num_heads, self.num_heads)
        return owner.to(kept.dtype) * self.num_heads

    def loss(
        self, outputs: Tensor, targets: Mapping[str, Tensor], multipliers: Mapping[str, Tensor] | None = None
    ) -> FamilyLoss:
        """L = ½·``squared_error``, a mean over heads, each with its weight."""
        squared = clipped_squared_error(outputs, targets["returns"], targets["values"], self.cliprange)
        if "weights" in targets:
            squared = squared * targets["weights"]
        squared = squared.mean(-1)
        return FamilyLoss(total=0.5 * squared, terms={"squared_error": squared})

    def statistics(self, outputs: Tensor) -> dict[str, Tensor]:
        """The heads' disagreement (standard deviation over N) and, unless all see all, how far the minimum lies below.

        ``ensemble/below_mean`` is mean_i V_i − min_i V_i. Both are in units of reward.
        """
        measured = {"ensemble/std": population_std(outputs, -1)}
        if self.heads_see != "all":
            measured["ensemble/below_mean"] = outputs.mean(-1) - outputs.amin(-1)
        return measured

    def start_at(self, weight: Tensor, bias: Tensor, value_weight: Tensor, value_bias: Tensor) -> bool:
        """Moves the heads' mean to the value; the smallest of them, this family's value, starts below it."""
        return move_to_value(weight, bias, value_weight, value_bias)
