# SPDX-License-Identifier: Apache-2.0
"""The settings of the DVPO loss, checked when they are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ._checks import check_not_negative, check_tail

CONSTRAINT_TERMS = ("cvar", "gain", "shift", "shape", "curvature")
TERMS = ("risk", *CONSTRAINT_TERMS, "consistency")
CONSTRAINT_MODES = ("batch", "token")
CONSTRAINT_STATISTICS = ("value", "level")
RISK_FORMS = ("separable", "readout")
#: Constraints that have a form in units of a level (docs/critic_lab.md says why the others have none).
LEVEL_TERMS = ("cvar", "gain", "shift")

# Shipped coefficients for each of CONSTRAINT_STATISTICS; docs/critic_lab.md has the measurements behind them.
DEFAULT_COEF: Mapping[str, float] = MappingProxyType(
    {"risk": 0.1, "cvar": 0.0005, "gain": 0.02, "shift": 0.005, "shape": 0.02, "curvature": 0.0, "consistency": 0.1}
)
DEFAULT_LEVEL_COEF: Mapping[str, float] = MappingProxyType(
    {"risk": 0.1, "cvar": 0.02, "gain": 0.02, "shift": 0.02, "shape": 0.0, "curvature": 0.0, "consistency": 0.1}
)


@dataclass(frozen=True)
class DVPOLossConfig:
    """Settings of ``dvpo_loss`` (docs/method.md, section 4).

    Attributes:
        kappa: κ ≥ 0, width of the Huber loss's quadratic zone in units of the value; 0 gives the pinball loss. A κ as
            large as the range of the values fits expectiles, not quantiles.
        alpha: share of the points in the lower tail, in (0, 0.5].
        beta: share of the points in the upper tail, in (0, 0.5].
        risk_temperature: > 0, in units of a level: ``risk`` weights level τ by exp(−τ/risk_temperature). At 1 the
            lowest level weighs e times the highest.
        risk_form: ``separable`` (rebuilt, Eq 4 to the letter): a term of the loss, the pinballs with these weights; it
            moves no minimiser. ``readout`` (rebuilt): no term; coef.risk ≤ 1 is the share of a mean with these weights
            in the value that is read from the quantiles.
        constraint: ``batch`` (ours: a constraint acts when the update violates it on average) or ``token`` (the papers'
            literal reading: it acts on each token, and noisy targets then drive the top quantiles away).
        constraint_statistics: the unit of a violation. ``value``: that of the value. ``level`` (ours): that of a level,
            the share of the targets below a quantile minus its τ; two-sided and inside [−1, 1] for any targets.
            ``level`` needs ``constraint`` ``batch`` and midpoint levels, and has no ``shape`` and no ``curvature``.
        coef: coefficient ≥ 0 of each term; 0 removes the term and its cost. A name left out keeps the default of
            ``DEFAULT_COEF``, or of ``DEFAULT_LEVEL_COEF`` with ``level``.

    Raises:
        ValueError: a field is outside its range, or two fields do not fit together.
    """

    kappa: float = 1.0
    alpha: float = 0.1
    beta: float = 0.1
    risk_temperature: float = 1.0
    risk_form: str = "separable"
    constraint: str = "batch"
    constraint_statistics: str = "value"
    coef: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_not_negative("kappa", self.kappa)
        check_tail("alpha", self.alpha)
        check_tail("beta", self.beta)
        check_not_negative("risk_temperature", self.risk_temperature)
        if self.risk_temperature == 0:
            raise ValueError("risk_temperature is 0; it must be greater than 0")
        if self.risk_form not in RISK_FORMS:
            raise ValueError(f"risk_form is {self.risk_form!r}; it must be one of {', '.join(RISK_FORMS)}")
        if self.constraint not in CONSTRAINT_MODES:
            raise ValueError(f"constraint is {self.constraint!r}; it must be one of {', '.join(CONSTRAINT_MODES)}")
        if self.constraint_statistics not in CONSTRAINT_STATISTICS:
            raise ValueError(
                f"constraint_statistics is {self.constraint_statistics!r}; it must be one of "
                f"{', '.join(CONSTRAINT_STATISTICS)}"
            )
        unknown = sorted(set(self.coef) - set(TERMS))
        if unknown:
            raise ValueError(f"coef has unknown terms {', '.join(unknown)}; allowed are {', '.join(TERMS)}")
        for name, value in self.coef.items():
            check_not_negative(f"coef.{name}", value)
        default = DEFAULT_LEVEL_COEF if self.constraint_statistics == "level" else DEFAULT_COEF
        object.__setattr__(self, "coef", {**default, **self.coef})
        if self.risk_form == "readout" and self.coef["risk"] > 1.0:
            raise ValueError(
                f"coef.risk is {self.coef['risk']}, but risk_form is 'readout'; there it is a share and must be in "
                "[0, 1]; lower it, or set risk_form to 'separable'"
            )
        if self.constraint_statistics == "level":
            self._check_level()

    def _check_level(self) -> None:
        if self.constraint != "batch":
            raise ValueError(
                f"constraint_statistics is 'level', but constraint is {self.constraint!r}; violations in levels are "
                "averaged over an update; set constraint to 'batch', or constraint_statistics to 'value'"
            )
        for name in CONSTRAINT_TERMS:
            if name not in LEVEL_TERMS and self.coef[name] > 0:
                raise ValueError(
                    f"constraint_statistics is 'level', but coef.{name} is {self.coef[name]}; {name} has no form in "
                    f"levels; set coef.{name} to 0, or constraint_statistics to 'value'"
                )


def check_level_statistics(top_level: float, config: DVPOLossConfig) -> None:
    """Raises ValueError for ``constraint_statistics: level`` with a level of 1 (``levels: right``).

    At τ = 1 the pinball loss never pulls down while ``gain`` pushes up, so in a shared network the last quantile runs
    away (docs/critic_lab.md).

    Args:
        top_level: the highest τ, in (0, 1].
        config: settings of the loss.
    """
    if config.constraint_statistics == "level" and top_level >= 1.0:
        raise ValueError(
            "constraint_statistics is 'level', but levels is 'right'; right levels end at 1, where nothing pulls a "
            "quantile down; set levels to 'midpoint', or constraint_statistics to 'value'"
        )
