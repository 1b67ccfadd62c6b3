# SPDX-License-Identifier: Apache-2.0
"""The scalar critic of PPO: the same loss as verl's own, number for number; and its Huber form, a robust control."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from verl_dvpo.distributional.returns import distributional_gae
from verl_dvpo.families.base import FamilyConfig, FamilyLoss, SampledFamily, move_to_value
from verl_dvpo.families.bounds import require_at_least, require_finite
from verl_dvpo.families.registry import register_family


@dataclass(frozen=True, kw_only=True)
class ScalarConfig(FamilyConfig):
    """Settings of ``family: scalar``.

    Attributes:
        cliprange: >= 0, in units of reward: how far a prediction may move from its old value before the clipped loss
            takes over. verl's ``critic.cliprange_value``.
        huber: null for the squared error; κ > 0, in units of reward, for Huber's loss, which is linear beyond κ. A
            control: what a scalar critic gains from robustness alone, without a distribution.
    """

    cliprange: float = 0.5
    huber: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("cliprange", self.cliprange, 0.0)
        if self.huber is not None:
            require_finite("huber", self.huber, above=0.0)


@register_family("scalar")
class ScalarFamily(SampledFamily):
    """One output, the value; squared or Huber error to the λ-return, with PPO's clipping around the old value."""

    Config = ScalarConfig

    def __init__(self, config: ScalarConfig) -> None:
        self.cliprange = config.cliprange
        self.huber = config.huber
        self.num_outputs = self.num_kept = 1

    def value(self, outputs: Tensor) -> Tensor:
        """(..., 1) -> (...)."""
        return outputs.squeeze(-1)

    def samples(self, outputs: Tensor) -> Tensor:
        """(..., 1) -> (..., 1): the value, a distribution of one point."""
        return outputs

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
        """Returns ``returns`` (B, T, 1), the λ-return of GAE (arXiv 1506.02438), and ``values`` (B, T, 1)."""
        returns, _ = distributional_gae(rewards, kept, mask, gamma=gamma, lam=lam)
        return {"returns": returns, "values": kept}

    def loss(
        self, outputs: Tensor, targets: Mapping[str, Tensor], multipliers: Mapping[str, Tensor] | None = None
    ) -> FamilyLoss:
        """L = ½·``squared_error``, or H_κ = ``huber``."""
        squared = clipped_squared_error(outputs, targets["returns"], targets["values"], self.cliprange).squeeze(-1)
        if self.huber is not None:
            huber = huber_of_squared(squared, self.huber)
            return FamilyLoss(total=huber, terms={"huber": huber})
        return FamilyLoss(total=0.5 * squared, terms={"squared_error": squared})

    def start_at(self, weight: Tensor, bias: Tensor, value_weight: Tensor, value_bias: Tensor) -> bool:
        """Takes the value over as it is."""
        return move_to_value(weight, bias, value_weight, value_bias)


def huber_of_squared(squared: Tensor, kappa: float) -> Tensor:
    """Computes Huber's loss from a squared error u²: ½u² where |u| ≤ κ, else κ·(|u| − ½κ). (paper: Huber, 1964)

    It grows with u², so the larger of two squared errors also has the larger Huber loss: PPO's clipping goes first.

    Args:
        squared: (...) u² >= 0, in units of reward squared.
        kappa: κ > 0, in units of reward.

    Returns:
        (...), with gradient 0 and no NaN at u = 0.
    """
    # The square root's slope is infinite at 0, so it never sees the inside.
    distance = squared.clamp_min(kappa**2).sqrt()
    return torch.where(squared <= kappa**2, 0.5 * squared, kappa * (distance - 0.5 * kappa))


def clipped_squared_error(values: Tensor, returns: Tensor, old: Tensor, cliprange: float) -> Tensor:
    """PPO's value loss without its factor of one half: the larger of the plain and of the clipped squared error.

    max((V − R)², (clip(V, V_old ± cliprange) − R)²), elementwise over N heads: each head is clipped around itself.

    Args:
        values: (..., N) with gradient.
        returns: (..., 1), or (..., N).
        old: (..., N) the values before the update.
        cliprange: >= 0, in units of reward.

    Returns:
        (..., N).
    """
    clipped = values.clamp(old - cliprange, old + cliprange)
    return torch.maximum((values - returns).square(), (clipped - returns).square())
