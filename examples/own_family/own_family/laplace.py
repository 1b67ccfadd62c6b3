# SPDX-License-Identifier: Apache-2.0
"""A critic with a Laplace distribution: location and scale from the head, negative log-likelihood of λ-returns as loss.

The likelihood pulls the location by the sign of the error over the scale: an outlier pulls no harder than others.

Shapes: B sequences, T response positions, L tokens, J quantile levels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from verl_dvpo.distributional import distributional_gae
from verl_dvpo.families.base import FamilyConfig, FamilyLoss, ValueFamily


@dataclass(frozen=True, kw_only=True)
class LaplaceConfig(FamilyConfig):
    """Settings of the family.

    Attributes:
        min_scale: > 0, in units of reward: the smallest scale, which keeps the likelihood finite.
    """

    min_scale: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.min_scale > 0:
            raise ValueError(f"min_scale is {self.min_scale!r}; it must be a number > 0")


class LaplaceFamily(ValueFamily):
    """Z(s) ~ Laplace(μ, b): outputs (..., 2) are μ and log(b − min_scale)."""

    Config = LaplaceConfig

    def __init__(self, config: LaplaceConfig) -> None:
        self.min_scale = config.min_scale
        self.num_outputs, self.num_kept = 2, 1

    def scale(self, outputs: Tensor) -> Tensor:
        """(..., 2) -> (...): b, in units of reward."""
        return self.min_scale + outputs[..., 1].exp()

    def value(self, outputs: Tensor) -> Tensor:
        """(..., 2) -> (...): the location."""
        return outputs[..., 0]

    def quantiles(self, outputs: Tensor, levels: Tensor) -> Tensor:
        """(..., 2) and (J,) -> (..., J): μ − b·sign(τ − ½)·log(1 − 2|τ − ½|)."""
        centred = levels - 0.5
        standard = -centred.sign() * torch.log1p(-2.0 * centred.abs())
        return self.value(outputs)[..., None] + self.scale(outputs)[..., None] * standard

    def keep(self, outputs: Tensor) -> Tensor:
        """(..., 2) -> (..., 1): the location; λ-returns need no more."""
        return outputs[..., :1]

    def values_from_kept(self, kept: Tensor) -> Tensor:
        """(..., 1) -> (...)."""
        return kept.squeeze(-1)

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
        """Returns ``returns`` (B, T), the λ-return of GAE."""
        returns, _ = distributional_gae(rewards, kept, mask, gamma=gamma, lam=lam)
        return {"returns": returns.squeeze(-1)}

    def loss(
        self, outputs: Tensor, targets: Mapping[str, Tensor], multipliers: Mapping[str, Tensor] | None = None
    ) -> FamilyLoss:
        """L = log(2b) + |R − μ|/b."""
        scale = self.scale(outputs)
        likelihood = math.log(2.0) + scale.log() + (targets["returns"] - self.value(outputs)).abs() / scale
        return FamilyLoss(total=likelihood, terms={"negative_log_likelihood": likelihood})

    def statistics(self, outputs: Tensor) -> dict[str, Tensor]:
        """The scale, averaged as ``critic/laplace/scale``."""
        return {"laplace/scale": self.scale(outputs)}
