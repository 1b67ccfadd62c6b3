# SPDX-License-Identifier: Apache-2.0
"""The worst-case baseline: N scalar heads, of which the smallest is the value of a state."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from verl_dvpo.distributional.metrics import population_std
from verl_dvpo.distributional.returns import distributional_gae
from verl_dvpo.families.base import FamilyConfig, FamilyLoss, SampledFamily
from verl_dvpo.families.bounds import require_at_least, require_integer
from verl_dvpo.families.registry import register_family
from verl_dvpo.families.scalar import clipped_squared_error


@dataclass(frozen=True, kw_only=True)
class RobustBellmanConfig(FamilyConfig):
    """Settings of ``family: robust_bellman``.

    Attributes:
        num_heads: N >= 1.
        cliprange: >= 0, in units of reward; as in ``scalar``.
    """

    num_heads: int = 3
    cliprange: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer("num_heads", self.num_heads, least=1)
        require_at_least("cliprange", self.cliprange, 0.0)


@register_family("robust_bellman")
class RobustBellmanFamily(SampledFamily):
    """V(s) = min_i V_i(s) is the actor's baseline and the bootstrap in the λ-return; every head is regressed on that.

    L = mean over heads of ½·``squared_error`` (PPO's, clipped around the head's own old value). A baseline of [DVPO]
    and [DFPO], rebuilt: no formula was at hand. With N = 1 it is ``scalar``, number for number.
    """

    Config = RobustBellmanConfig

    def __init__(self, config: RobustBellmanConfig) -> None:
        self.num_heads = self.num_outputs = self.num_kept = config.num_heads
        self.cliprange = config.cliprange

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
    ) -> dict[str, Tensor]:
        """Returns ``returns`` (B, T, 1), the λ-return (arXiv 1506.02438) on the minimum, and ``values`` (B, T, N)."""
        returns, _ = distributional_gae(rewards, self.samples(kept), mask, gamma=gamma, lam=lam)
        return {"returns": returns, "values": kept}

    def loss(
        self, outputs: Tensor, targets: Mapping[str, Tensor], multipliers: Mapping[str, Tensor] | None = None
    ) -> FamilyLoss:
        """L = ½·``squared_error``, a mean over heads."""
        squared = clipped_squared_error(outputs, targets["returns"], targets["values"], self.cliprange).mean(-1)
        return FamilyLoss(total=0.5 * squared, terms={"squared_error": squared})

    def statistics(self, outputs: Tensor) -> dict[str, Tensor]:
        """The heads' disagreement: standard deviation over N, in units of reward."""
        return {"ensemble/std": population_std(outputs, -1)}
