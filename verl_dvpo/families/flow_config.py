# SPDX-License-Identifier: Apache-2.0
"""The settings of the value flow, typed and checked where they are made."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from verl_dvpo.distributional.config import TERMS, DVPOLossConfig

#: Terms on the field, and constraints on the one-step samples.
FIELD_TERMS = ("anchor", "flow_matching", "straightness")
FLOW_CONSTRAINTS = ("cvar", "gain", "shift", "shape")
FLOW_TERMS = FIELD_TERMS + FLOW_CONSTRAINTS

#: The anchor's pull has a slope of `step`, where DVPO's pinball has one of 1: so the constraints weigh 1/20 of the 0.02
#: that spec section 4 starts from. On 9 fair ±1 steps with a terminal reward (spec, section 3; sample replacement,
#: λ = 0.95) a table of flows gets V to within 0.006 and the distribution to a W1 of 0.016; 0.004 and 0.009 without
#: `flow_matching`, 0.017 and 0.055 with ten times as much of it. A table of 50 quantiles: 0.005 and 0.008.
FLOW_COEF: Mapping[str, float] = MappingProxyType(
    {
        "anchor": 1.0,
        "flow_matching": 0.005,
        "straightness": 1.0,
        "cvar": 0.001,
        "gain": 0.001,
        "shift": 0.001,
        "shape": 0.001,
    }
)


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Parameters of the value flow.

    Attributes:
        num_noises: K >= 2 base noises, and samples of a state's value. 64 keep a third of what 200 quantiles keep and
            come as close to known distributions; 32 points cannot (tests/families/test_known_distributions.py).
        num_frequencies: I >= 1 cosines over the base distribution; I = K can give every sample a value of its own.
        num_powers: P >= 1 powers of the virtual time u; 1 is a field that does not depend on u.
        value_scale: σ > 0, in units of reward: the spread of the base noises, and of a state that is not learned yet.
            A little above the returns' own, which for returns in [0, 1] is at most 0.5: paths that widen are harder to
            follow in one step.
        euler_steps: >= 1 steps from noise to sample; 1 is the paper's. More cost as much again each, and log what one
            step loses.
        target: ``quantile_gae`` (Eq 2 of DVPO on the samples) or ``sample_replacement``.
        coupling: ``calibrated`` (ours) or ``sorted`` (the k-th noise goes to the k-th smallest target of its token):
            see :class:`~verl_dvpo.families.value_flow.ValueFlowFamily`.
        step: > 0, in units of value_scale: how far ``calibrated`` moves a sample at once.
        uncertainty: c >= 0, per unit of reward: w = sigmoid(−c·spread(s')) + ½ weighs `flow_matching`.
        collapse_threshold: >= 0: a spread below this share of the rewards' standard deviation is a collapse; 0 never
            warns.
        alpha: lower tail's share of the samples, in (0, 0.5].
        beta: upper tail's share of the samples, in (0, 0.5].
        constraint: ``batch`` (ours) or ``token``: how `cvar`, `gain`, `shift` and `shape` act.
        coef: coefficient >= 0 of each term; 0 removes the term and its cost. Names left out keep their default.
    """

    num_noises: int = 64
    num_frequencies: int = 64
    num_powers: int = 3
    value_scale: float = 0.7
    euler_steps: int = 1
    target: str = "sample_replacement"
    coupling: str = "calibrated"
    step: float = 0.05
    uncertainty: float = 1.0
    collapse_threshold: float = 0.02
    alpha: float = 0.1
    beta: float = 0.1
    constraint: str = "batch"
    coef: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, low in (("num_noises", 2), ("num_frequencies", 1), ("num_powers", 1), ("euler_steps", 1)):
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} must be >= {low}, got {getattr(self, name)}")
        for name in ("value_scale", "step"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must be a finite number > 0, got {getattr(self, name)}")
        for name in ("uncertainty", "collapse_threshold"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must be a finite number >= 0, got {getattr(self, name)}")
        for name, allowed in (
            ("target", ("quantile_gae", "sample_replacement")),
            ("coupling", ("calibrated", "sorted")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {list(allowed)}, got {getattr(self, name)!r}")
        unknown = sorted(set(self.coef) - set(FLOW_TERMS))
        if unknown:
            raise ValueError(f"coef has unknown terms {', '.join(unknown)}; allowed are {', '.join(FLOW_TERMS)}")
        object.__setattr__(self, "coef", {**FLOW_COEF, **self.coef})
        for name in FLOW_TERMS:
            if not (self.coef[name] >= 0 and math.isfinite(self.coef[name])):
                raise ValueError(f"coef.{name} must be a finite number >= 0, got {self.coef[name]}")
        if not any(self.coef.values()):
            raise ValueError(f"coef must keep one of {', '.join(FLOW_TERMS)} above 0, got none")
        self.constraints()

    def constraints(self) -> DVPOLossConfig:
        """What :mod:`verl_dvpo.distributional.constraints` needs to know.

        Raises:
            ValueError: alpha, beta or constraint is not allowed.
        """
        chosen = {name: self.coef[name] for name in FLOW_CONSTRAINTS}
        return DVPOLossConfig(
            alpha=self.alpha, beta=self.beta, constraint=self.constraint, coef=dict.fromkeys(TERMS, 0.0) | chosen
        )
