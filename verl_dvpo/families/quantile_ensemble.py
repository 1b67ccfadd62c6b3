# SPDX-License-Identifier: Apache-2.0
"""DVPO's critic: N heads of M quantiles each (arXiv 2512.03847)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from verl_dvpo.distributional.config import CONSTRAINT_TERMS, DVPOLossConfig, check_level_statistics
from verl_dvpo.distributional.constraints import constraint_multipliers
from verl_dvpo.distributional.levels import quantile_levels
from verl_dvpo.distributional.losses import dvpo_loss
from verl_dvpo.distributional.metrics import crossing_fraction, population_std
from verl_dvpo.distributional.returns import distributional_gae, sample_replacement_returns
from verl_dvpo.distributional.sorting import sort_samples
from verl_dvpo.families.base import FamilyLoss, Reduce, ValueFamily


class QuantileEnsembleFamily(ValueFamily):
    """Eq 1 [DVPO, paper]: θ_j(s) = (1/N) Σ_i θ_ij(s); outputs are laid out as (N, M).

    Args:
        num_heads: N >= 1.
        num_quantiles: M >= 1.
        levels: ``right`` (τ_j = j/M, paper) or ``midpoint`` (τ_j = (2j−1)/(2M), ours).
        target: ``quantile_gae`` (Eq 2, paper) or ``sample_replacement`` (ours, after GMAC).
        loss: the eight terms and their coefficients.

    Raises:
        ValueError: a count below 1, an unknown kind of levels or target, or ``right`` levels with constraints in units
            of a level (``constraint_statistics: level``).
    """

    def __init__(
        self,
        *,
        num_heads: int = 3,
        num_quantiles: int = 200,
        levels: str = "right",
        target: str = "quantile_gae",
        loss: DVPOLossConfig | None = None,
    ) -> None:
        for name, count in (("num_heads", num_heads), ("num_quantiles", num_quantiles)):
            if count < 1:
                raise ValueError(f"{name} must be >= 1, got {count}")
        if target not in ("quantile_gae", "sample_replacement"):
            raise ValueError(f"target must be 'quantile_gae' or 'sample_replacement', got {target!r}")
        self.num_heads = num_heads
        self.num_quantiles = num_quantiles
        self.num_outputs = num_heads * num_quantiles
        self.num_kept = num_quantiles
        self.target = target
        self.loss_config = loss or DVPOLossConfig()
        self.levels = quantile_levels(num_quantiles, levels, dtype=torch.float32)
        check_level_statistics(float(self.levels[-1]), self.loss_config)

    def _heads(self, outputs: Tensor) -> Tensor:
        """(..., D) -> (..., N, M)."""
        return outputs.unflatten(-1, (self.num_heads, self.num_quantiles))

    def _levels_on(self, device: torch.device) -> Tensor:
        if self.levels.device != device:
            self.levels = self.levels.to(device)
        return self.levels

    def samples(self, outputs: Tensor) -> Tensor:
        return sort_samples(self._heads(outputs).mean(-2))

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
        """``targets`` (B, T, M) by Eq 2 or by sample replacement, and ``old`` (B, T, M), the quantiles they rest on."""
        if self.target == "quantile_gae":
            targets, _ = distributional_gae(rewards, kept, mask, gamma=gamma, lam=lam)
        else:
            targets = sample_replacement_returns(rewards, kept, mask, gamma=gamma, lam=lam, generator=generator)
        return {"targets": targets, "old": kept}

    def loss(
        self, outputs: Tensor, targets: Mapping[str, Tensor], multipliers: Mapping[str, Tensor] | None = None
    ) -> FamilyLoss:
        levels = self._levels_on(outputs.device)
        result = dvpo_loss(self._heads(outputs), targets["targets"], levels, self.loss_config, multipliers)
        return FamilyLoss(total=result.total, terms=result.terms)

    def multipliers(
        self, targets: Mapping[str, Tensor], mask: Tensor, *, reduce: Reduce | None = None
    ) -> dict[str, Tensor]:
        """Those of ``constraint: batch``; none for ``token`` or where every constraint is switched off."""
        config = self.loss_config
        if config.constraint != "batch" or not any(config.coef[name] > 0 for name in CONSTRAINT_TERMS):
            return {}
        levels = self._levels_on(mask.device)
        return constraint_multipliers(targets["old"], targets["targets"], mask, levels, config, reduce=reduce)

    def statistics(self, outputs: Tensor) -> dict[str, Tensor]:
        """q10, q50, q90, spread (standard deviation over quantiles), crossing fraction, and the heads' disagreement."""
        heads = self._heads(outputs)
        quantiles = heads.mean(-2)
        ascending = sort_samples(quantiles)
        return {
            "quantile/q10": ascending[..., round(0.1 * (self.num_quantiles - 1))],
            "quantile/q50": ascending[..., round(0.5 * (self.num_quantiles - 1))],
            "quantile/q90": ascending[..., round(0.9 * (self.num_quantiles - 1))],
            "quantile/spread": population_std(ascending, -1),
            "quantile/crossing_fraction": crossing_fraction(quantiles),
            "ensemble/std": population_std(heads.mean(-1), -1),
            "ensemble/quantile_std": population_std(heads, -2).mean(-1),
        }

    def init_head(self, weight: Tensor, bias: Tensor, generator: torch.Generator) -> None:
        """Each head is drawn on its own; its M quantiles share a weight and differ by an ascending bias. (ours)

        So no pair is out of order, and no two are equal: which of equal quantiles belong to a tail is left to rounding.
        The bias runs from −0.01 to 0.01, in units of reward.
        """
        rows = torch.empty(self.num_heads, 1, weight.shape[1], dtype=weight.dtype)
        rows.normal_(std=0.1 * weight.shape[1] ** -0.5, generator=generator)
        weight.copy_(rows.expand(-1, self.num_quantiles, -1).flatten(0, 1))
        if self.num_quantiles == 1:
            bias.zero_()
        else:
            bias.copy_(torch.linspace(-0.01, 0.01, self.num_quantiles, dtype=bias.dtype).repeat(self.num_heads))
