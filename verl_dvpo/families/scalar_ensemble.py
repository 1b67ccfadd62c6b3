# SPDX-License-Identifier: Apache-2.0
"""N scalar heads with DVPO's aggregation, consistency and shift, but no distribution: DVPO's control experiment.

The distribution earns what ``dvpo`` does better than this; the ensemble earns what this does better than ``scalar``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from verl_dvpo.distributional.config import DEFAULT_COEF, TERMS, DVPOLossConfig
from verl_dvpo.distributional.constraints import constraint_multipliers, constraint_terms
from verl_dvpo.distributional.levels import quantile_levels
from verl_dvpo.distributional.losses import head_consistency
from verl_dvpo.distributional.metrics import population_std
from verl_dvpo.distributional.returns import distributional_gae
from verl_dvpo.families.base import FamilyConfig, FamilyLoss, Reduce, SampledFamily, move_to_value
from verl_dvpo.families.bounds import require_at_least, require_integer, require_terms
from verl_dvpo.families.registry import register_family
from verl_dvpo.families.scalar import clipped_squared_error

#: The terms of DVPO that mean something without a distribution.
ENSEMBLE_TERMS = ("consistency", "shift")


@dataclass(frozen=True, kw_only=True)
class ScalarEnsembleConfig(FamilyConfig):
    """Settings of ``family: scalar_ensemble``.

    Attributes:
        num_heads: N >= 1.
        cliprange: >= 0, in units of reward; as in ``scalar``.
        constraint: ``batch`` (ours) or ``token`` (the paper's literal reading): how ``shift`` acts.
        coef: coefficients >= 0 of ``consistency`` and ``shift``; 0 switches a term off. Names left out keep DVPO's.
    """

    meaning: ClassVar[tuple[str, ...]] = ("num_heads",)

    num_heads: int = 3
    cliprange: float = 0.5
    constraint: str = "batch"
    coef: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer("num_heads", self.num_heads, least=1)
        require_at_least("cliprange", self.cliprange, 0.0)
        require_terms(self.coef, ENSEMBLE_TERMS)
        chosen = {name: self.coef.get(name, DEFAULT_COEF[name]) for name in ENSEMBLE_TERMS}
        object.__setattr__(self, "coef", chosen)
        self.loss_config()

    def loss_config(self) -> DVPOLossConfig:
        """DVPO's loss with these two terms alone.

        Raises:
            ValueError: a coefficient is negative, or ``constraint`` is unknown.
        """
        return DVPOLossConfig(constraint=self.constraint, coef=dict.fromkeys(TERMS, 0.0) | dict(self.coef))


@register_family("scalar_ensemble")
class ScalarEnsembleFamily(SampledFamily):
    """V(s) = (1/N) Σ_i V_i(s), every head regressed on the λ-return of V; with Eqs 7 and 10 of [DVPO] for M = 1.

    L = mean over heads of ½·``squared_error`` (PPO's, clipped around the head's own old value)
    + coef[consistency]·``consistency`` + coef[shift]·``shift`` (docs/method.md, section 4). With N = 1 and both
    coefficients 0 it is ``scalar``, number for number.
    """

    Config = ScalarEnsembleConfig

    def __init__(self, config: ScalarEnsembleConfig) -> None:
        self.num_heads = self.num_outputs = self.num_kept = config.num_heads
        self.cliprange = config.cliprange
        self.loss_config = config.loss_config()
        self.level = quantile_levels(1, "midpoint", dtype=torch.float32)

    def value(self, outputs: Tensor) -> Tensor:
        """(..., N) -> (...): the head mean."""
        return outputs.mean(-1)

    def head_values(self, outputs: Tensor) -> Tensor:
        """(..., N) -> (..., N)."""
        return outputs

    def samples(self, outputs: Tensor) -> Tensor:
        """(..., N) -> (..., 1): the head mean."""
        return outputs.mean(-1, keepdim=True)

    def keep(self, outputs: Tensor) -> Tensor:
        """(..., N) -> (..., N): every head, because each is clipped around its own old value."""
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
        """Returns ``returns`` (B, T, 1), the λ-return (arXiv 1506.02438) on the head mean, and ``values`` (B, T, N)."""
        returns, _ = distributional_gae(rewards, self.samples(kept), mask, gamma=gamma, lam=lam)
        return {"returns": returns, "values": kept}

    def loss(
        self, outputs: Tensor, targets: Mapping[str, Tensor], multipliers: Mapping[str, Tensor] | None = None
    ) -> FamilyLoss:
        """L of the class, for tokens in any order.

        Raises:
            ValueError: ``constraint`` is ``batch``, ``shift`` is active, and ``multipliers`` is None.
        """
        config, returns = self.loss_config, targets["returns"]
        squared = clipped_squared_error(outputs, returns, targets["values"], self.cliprange).mean(-1)
        total, terms = 0.5 * squared, {"squared_error": squared}
        mean_head = self.samples(outputs)
        if config.coef["consistency"] > 0:
            terms["consistency"] = head_consistency(outputs.unsqueeze(-1), mean_head)
            total = total + config.coef["consistency"] * terms["consistency"]
        if config.coef["shift"] > 0:
            if config.constraint == "batch" and multipliers is None:
                raise ValueError(
                    "multipliers is None, but constraint is 'batch' and shift is active; "
                    "pass what multipliers() returned"
                )
            given = multipliers if config.constraint == "batch" else None
            terms |= constraint_terms(mean_head, returns, self.level, config, ["shift"], given)
            total = total + config.coef["shift"] * terms["shift"]
        coef = {name: config.coef.get(name, 0.5) for name in terms}
        return FamilyLoss(total=total, terms=terms, coef=coef)

    def multipliers(
        self, targets: Mapping[str, Tensor], mask: Tensor, *, reduce: Reduce | None = None
    ) -> dict[str, Tensor]:
        """The multiplier of ``shift`` under ``constraint: batch``; none otherwise."""
        config = self.loss_config
        if config.constraint != "batch" or config.coef["shift"] == 0:
            return {}
        old, returns = self.samples(targets["values"]), targets["returns"]
        found = constraint_multipliers(old, returns, mask, self.level, config, reduce=reduce)
        return {"shift": found["shift"]}

    def statistics(self, outputs: Tensor) -> dict[str, Tensor]:
        """The heads' disagreement: standard deviation over N, in units of reward."""
        return {"ensemble/std": population_std(outputs, -1)}

    def start_at(self, weight: Tensor, bias: Tensor, value_weight: Tensor, value_bias: Tensor) -> bool:
        """Moves the heads' mean to the value; they keep their first distances from it."""
        return move_to_value(weight, bias, value_weight, value_bias)
