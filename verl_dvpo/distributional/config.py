# SPDX-License-Identifier: Apache-2.0
"""The configuration of the DVPO loss, typed and checked where it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ._checks import check_not_negative, check_tail

CONSTRAINT_TERMS = ("cvar", "gain", "shift", "shape", "curvature")
TERMS = ("risk", *CONSTRAINT_TERMS, "consistency")
CONSTRAINT_MODES = ("batch", "token")

# Where spec section 4 starts from.
DEFAULT_COEF: Mapping[str, float] = MappingProxyType(
    {"risk": 0.1, "cvar": 0.02, "gain": 0.02, "shift": 0.02, "shape": 0.02, "curvature": 0.02, "consistency": 0.1}
)


@dataclass(frozen=True)
class DVPOLossConfig:
    """Parameters of `dvpo_loss`.

    Attributes:
        kappa: κ ≥ 0, width of the Huber loss's quadratic zone in units of the value; 0 is the pinball loss. κ of the
            order of the values' range fits expectiles instead of quantiles.
        alpha: lower tail's share of the points, in (0, 0.5].
        beta: upper tail's share of the points, in (0, 0.5].
        risk_temperature: > 0, in units of a level: the `risk` term weights level τ by exp(−τ/risk_temperature). At 1
            the lowest level counts e times the highest; smaller values look at the lower tail only.
        constraint: `batch` (a constraint acts when it is violated on average over the update, ours) or `token` (the
            papers' literal reading, which drives the top quantiles away when targets are noisy).
        coef: coefficient ≥ 0 of each term; 0 removes the term and its cost. Names that are left out keep their default.
    """

    kappa: float = 1.0
    alpha: float = 0.1
    beta: float = 0.1
    risk_temperature: float = 1.0
    constraint: str = "batch"
    coef: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_not_negative("kappa", self.kappa)
        check_tail("alpha", self.alpha)
        check_tail("beta", self.beta)
        check_not_negative("risk_temperature", self.risk_temperature)
        if self.risk_temperature == 0:
            raise ValueError("risk_temperature is 0; it must be greater than 0")
        if self.constraint not in CONSTRAINT_MODES:
            raise ValueError(f"constraint is {self.constraint!r}; it must be one of {', '.join(CONSTRAINT_MODES)}")
        unknown = sorted(set(self.coef) - set(TERMS))
        if unknown:
            raise ValueError(f"coef has unknown terms {', '.join(unknown)}; allowed are {', '.join(TERMS)}")
        for name, value in self.coef.items():
            check_not_negative(f"coef.{name}", value)
        object.__setattr__(self, "coef", {**DEFAULT_COEF, **self.coef})
