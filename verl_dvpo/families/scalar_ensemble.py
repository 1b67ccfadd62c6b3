# SPDX-License-Identifier: Apache-2.0
"""N scalar heads with DVPO's aggregation, consistency and shift, and no distribution: DVPO's control experiment.

What `dvpo` does better than this, the distribution does; what this does better than `scalar`, the ensemble does.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from verl_dvpo.distributional.config import DEFAULT_COEF, TERMS, DVPOLossConfig
from verl_dvpo.distributional.constraints import constraint_multipliers, constraint_terms
from verl_dvpo.distributional.levels import quantile_levels
from verl_dvpo.distributional.losses import head_consistency
from verl_dvpo.distributional.metrics import population_std
from verl_dvpo.distributional.returns import distributional_gae
from verl_dvpo.families.base import FamilyLoss, Reduce, ValueFamily
from verl_dvpo.families.scalar import clipped_squared_error, require_cliprange, require_heads

#: The terms of DVPO that mean something without a distribution.
ENSEMBLE_TERMS = ("consistency", "shift")


class ScalarEnsembleFamily(ValueFamily):
    """V(s) = (1/N) Σ_i V_i(s), every head regressed on the λ-return of V; with Eqs 7 and 10 of [DVPO] for M = 1.

    L = mean over heads of ½·`squared_error` (PPO's, clipped around the head's own old value)
    + coef[consistency]·`consistency` + coef[shift]·`shift` (spec, section 4). With N = 1 and both coefficients 0 it is
    `scalar`, number for number.

    Args:
        num_heads: N >= 1.
        cliprange: >= 0, in units of reward; as in `scalar`.
        constraint: ``batch`` or ``token``: how `shift` acts.
        coef: coefficients >= 0 of `consistency` and `shift`; 0 switches a term off. Names left out keep DVPO's.

    Raises:
        ValueError: an ensemble of none, a negative number, an unknown constraint or term.
    """

    def __init__(
        self,
        *,
        num_heads: int = 3,
        cliprange: float = 0.5,
        constraint: str = "batch",
        coef: Mapping[str, float] | None = None,
    ) -> None:
        require_heads(num_heads)
        require_cliprange(cliprange)
        coef = dict(coef or {})
        unknown = sorted(set(coef) - set(ENSEMBLE_TERMS))
        if unknown:
            raise ValueError(f"coef has unknown terms {', '.join(unknown)}; allowed are {', '.join(ENSEMBLE_TERMS)}")
        chosen = {name: coef.get(name, DEFAULT_COEF[name]) for name in ENSEMBLE_TERMS}
        self.num_heads = self.num_outputs = self.num_kept = num_heads
        self.cliprange = cliprange
        self.loss_config = DVPOLossConfig(constraint=constraint, coef=dict.fromkeys(TERMS, 0.0) | chosen)
        self.level = quantile_levels(1, "midpoint", dtype=torch.float32)

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
        """``returns`` (B, T, 1), the λ-return of GAE (arXiv 1506.02438) on the head mean; ``values`` (B, T, N)."""
        returns, _ = distributional_gae(rewards, self.samples(kept), mask, gamma=gamma, lam=lam)
        return {"returns": returns, "values": kept}

    def loss(
        self, outputs: Tensor, targets: Mapping[str, Tensor], multipliers: Mapping[str, Tensor] | None = None
    ) -> FamilyLoss:
        config, returns = self.loss_config, targets["returns"]
        squared = clipped_squared_error(outputs, returns, targets["values"], self.cliprange).mean(-1)
        total, terms = 0.5 * squared, {"squared_error": squared}
        mean_head = self.samples(outputs)
        if config.coef["consistency"] > 0:
            terms["consistency"] = head_consistency(outputs.unsqueeze(-1), mean_head)
            total = total + config.coef["consistency"] * terms["consistency"]
        if config.coef["shift"] > 0:
            if config.constraint == "batch" and multipliers is None:
                raise ValueError("multipliers is None, but constraint is 'batch' and shift is active")
            given = multipliers if config.constraint == "batch" else None
            terms |= constraint_terms(mean_head, returns, self.level, config, ["shift"], given)
            total = total + config.coef["shift"] * terms["shift"]
        return FamilyLoss(total=total, terms=terms)

    def multipliers(
        self, targets: Mapping[str, Tensor], mask: Tensor, *, reduce: Reduce | None = None
    ) -> dict[str, Tensor]:
        """That of `shift` under ``constraint: batch``; none otherwise."""
        config = self.loss_config
        if config.constraint != "batch" or config.coef["shift"] == 0:
            return {}
        old, returns = self.samples(targets["values"]), targets["returns"]
        found = constraint_multipliers(old, returns, mask, self.level, config, reduce=reduce)
        return {"shift": found["shift"]}

    def statistics(self, outputs: Tensor) -> dict[str, Tensor]:
        """The heads' disagreement: standard deviation over N, in units of reward."""
        return {"ensemble/std": population_std(outputs, -1)}
