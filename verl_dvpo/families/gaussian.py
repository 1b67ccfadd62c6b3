# SPDX-License-Identifier: Apache-2.0
"""A variance head: the value distribution as one normal distribution a state, the control of quantiles (ours)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from verl_dvpo.distributional.returns import distributional_gae, sample_replacement_returns
from verl_dvpo.families.base import FamilyConfig, FamilyLoss, ValueFamily
from verl_dvpo.families.bounds import require_choice, require_finite, require_integer
from verl_dvpo.families.registry import register_family


@dataclass(frozen=True, kw_only=True)
class GaussianConfig(FamilyConfig):
    """Settings of ``family: gaussian``.

    Attributes:
        min_std: > 0, in units of reward: the standard deviation stays above it. The slope of the mean's loss grows with
            1/variance, so it bounds how much more a certain state counts.
        max_std: > ``min_std``, in units of reward: the variance stays below max_std² + min_std².
        target: ``sample_replacement`` (ours, after GMAC): mean and variance of samples from the true mixture of n-step
            returns; ``gae``: the λ-return, whose variance is too small for λ < 1.
        num_samples: K >= 2, of ``sample_replacement``.
    """

    meaning: ClassVar[tuple[str, ...]] = ("min_std", "max_std")

    min_std: float = 0.1
    max_std: float = 100.0
    target: str = "sample_replacement"
    num_samples: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        require_finite("min_std", self.min_std, above=0.0)
        require_finite("max_std", self.max_std, above=self.min_std)
        require_choice("target", self.target, ("sample_replacement", "gae"))
        require_integer("num_samples", self.num_samples, least=2)


@register_family("gaussian")
class GaussianFamily(ValueFamily):
    """Z(s) = N(μ, σ²) with outputs (μ, ℓ); log σ² is ℓ, bent smoothly into its bounds so that it can always return.

    L = ½·(log σ² + ((m − μ)² + v)/σ²), the negative log-likelihood of K targets with mean m and population variance v,
    without its constant, averaged over them (the variance head of heteroscedastic regression).
    """

    Config = GaussianConfig
    num_outputs = 2
    num_kept = 2

    def __init__(self, config: GaussianConfig) -> None:
        self.low, self.high = 2.0 * math.log(config.min_std), 2.0 * math.log(config.max_std)
        self.target = config.target
        levels = (torch.arange(config.num_samples, dtype=torch.float64) + 0.5) / config.num_samples
        noises = torch.special.ndtri(levels)
        # Midpoints cut the tails: without the factor each bootstrap would shrink the spread by 2 % at K = 64.
        self.noises = (noises / noises.square().mean().sqrt()).float()

    def _log_variance(self, outputs: Tensor) -> Tensor:
        below = self.high - softplus(self.high - outputs[..., 1])
        bent: Tensor = self.low + softplus(below - self.low)
        return bent

    def value(self, outputs: Tensor) -> Tensor:
        """(..., 2) -> (...): μ."""
        return outputs[..., 0]

    def quantiles(self, outputs: Tensor, levels: Tensor) -> Tensor:
        """(..., 2) and (J,) in (0, 1) -> (..., J): μ + σ·Φ⁻¹(τ)."""
        std = (0.5 * self._log_variance(outputs)).exp()
        noises: Tensor = torch.special.ndtri(levels.double())
        return outputs[..., :1] + std.unsqueeze(-1) * noises.to(outputs.dtype)

    def keep(self, outputs: Tensor) -> Tensor:
        """(..., 2) -> (..., 2): μ and σ."""
        return torch.stack([outputs[..., 0], (0.5 * self._log_variance(outputs)).exp()], -1)

    def values_from_kept(self, kept: Tensor) -> Tensor:
        """(..., 2) -> (...): μ."""
        return kept[..., 0]

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
        """Returns ``mean`` and ``variance`` (B, T) of the targets of each token."""
        if self.target == "gae":
            returns, _ = distributional_gae(rewards, kept[..., :1], mask, gamma=gamma, lam=lam)
            return {"mean": returns[..., 0], "variance": torch.zeros_like(returns[..., 0])}
        if self.noises.device != kept.device:
            self.noises = self.noises.to(kept.device)
        points = kept[..., :1] + kept[..., 1:] * self.noises
        drawn = sample_replacement_returns(rewards, points, mask, gamma=gamma, lam=lam, generator=generator)
        return {"mean": drawn.mean(-1), "variance": drawn.var(-1, correction=0)}

    def loss(
        self, outputs: Tensor, targets: Mapping[str, Tensor], multipliers: Mapping[str, Tensor] | None = None
    ) -> FamilyLoss:
        """L of the class, for tokens in any order."""
        log_variance = self._log_variance(outputs)
        squared = (targets["mean"] - outputs[..., 0]).square() + targets["variance"]
        likelihood = 0.5 * (log_variance + squared * torch.exp(-log_variance))
        return FamilyLoss(total=likelihood, terms={"squared_error": squared})

    def statistics(self, outputs: Tensor) -> dict[str, Tensor]:
        """σ, in units of reward, under the name that it has for other distributions."""
        return {"quantile/spread": (0.5 * self._log_variance(outputs)).exp()}

    def init_head(self, weight: Tensor, bias: Tensor, generator: torch.Generator) -> None:
        """Draws μ as a scalar critic's; ℓ starts at 0, so every state's standard deviation is near 1."""
        weight.zero_()
        weight[0].normal_(std=0.1 * weight.shape[1] ** -0.5, generator=generator)
        bias.zero_()

    def start_at(self, weight: Tensor, bias: Tensor, value_weight: Tensor, value_bias: Tensor) -> bool:
        """Takes the value over as μ; every state keeps its first standard deviation."""
        weight[0] = value_weight
        bias[0] = value_bias
        return True
