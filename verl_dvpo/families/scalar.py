# SPDX-License-Identifier: Apache-2.0
"""The scalar critic of PPO, as a family: the same loss as verl's own, number for number."""

from collections.abc import Mapping

import torch
from torch import Tensor

from verl_dvpo.distributional.returns import distributional_gae
from verl_dvpo.families.base import FamilyLoss, ValueFamily


class ScalarFamily(ValueFamily):
    """One output, the value itself; squared error to the lambda-return, with PPO's clipping around the old value.

    Args:
        cliprange: how far, in units of reward, a prediction may move from its old value before the clipped loss
            takes over; >= 0. verl's ``critic.cliprange_value``.

    Raises:
        ValueError: ``cliprange`` is negative.
    """

    num_outputs = 1
    num_kept = 1

    def __init__(self, *, cliprange: float = 0.5) -> None:
        require_cliprange(cliprange)
        self.cliprange = cliprange

    def samples(self, outputs: Tensor) -> Tensor:
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
        """``returns`` (B, T, 1), the lambda-return of GAE (arXiv 1506.02438), and ``values`` (B, T, 1)."""
        returns, _ = distributional_gae(rewards, kept, mask, gamma=gamma, lam=lam)
        return {"returns": returns, "values": kept}

    def loss(
        self, outputs: Tensor, targets: Mapping[str, Tensor], multipliers: Mapping[str, Tensor] | None = None
    ) -> FamilyLoss:
        squared = clipped_squared_error(outputs, targets["returns"], targets["values"], self.cliprange).squeeze(-1)
        return FamilyLoss(total=0.5 * squared, terms={"squared_error": squared})


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


def require_heads(num_heads: int) -> None:
    """Raises ValueError for an ensemble of none."""
    if num_heads < 1:
        raise ValueError(f"num_heads must be >= 1, got {num_heads}")


def require_cliprange(cliprange: float) -> None:
    """Raises ValueError for a negative range; NaN is one."""
    if not cliprange >= 0:
        raise ValueError(f"cliprange must be >= 0, got {cliprange}")
