# SPDX-License-Identifier: Apache-2.0
"""The critics that the lab trains, each by a name: family, target kind, levels, κ, terms, form of the constraints.

A new family is one line of `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from verl_dvpo.distributional import CONSTRAINT_TERMS, TERMS, DVPOLossConfig
from verl_dvpo.distributional.config import DEFAULT_COEF
from verl_dvpo.distributional.families.base import ValueFamily
from verl_dvpo.distributional.families.quantile_ensemble import QuantileEnsembleFamily
from verl_dvpo.distributional.families.robust_bellman import RobustBellmanFamily
from verl_dvpo.distributional.families.scalar import ScalarFamily
from verl_dvpo.distributional.families.scalar_ensemble import ScalarEnsembleFamily

from .forms import ConstraintFormFamily

#: Quantiles M and heads N in the lab: spec section 4's M, the paper's N.
NUM_QUANTILES = 50
NUM_HEADS = 3

OFF: Mapping[str, float] = dict.fromkeys(TERMS, 0.0)
TARGETS = {"eq2": "quantile_gae", "sr": "sample_replacement"}


@dataclass(frozen=True)
class Setup:
    """A critic of the lab.

    Attributes:
        build: makes the family.
        lam: trace λ of its targets; None takes the run's.
    """

    build: Callable[[], ValueFamily]
    lam: float | None = None


def quantiles(
    target: str = "eq2",
    *,
    levels: str = "midpoint",
    kappa: float = 0.0,
    coef: Mapping[str, float] = OFF,
    constraint: str = "batch",
) -> QuantileEnsembleFamily:
    """A quantile ensemble; the terms that `coef` leaves out are off."""
    loss = DVPOLossConfig(kappa=kappa, constraint=constraint, coef={**OFF, **coef})
    return QuantileEnsembleFamily(
        num_heads=NUM_HEADS, num_quantiles=NUM_QUANTILES, levels=levels, target=TARGETS[target], loss=loss
    )


def form(target: str, statistic: str, average: str, coef: Mapping[str, float], **loss: float) -> ConstraintFormFamily:
    """Pinballs on midpoints whose constraints take another form."""
    return ConstraintFormFamily(
        num_heads=NUM_HEADS,
        num_quantiles=NUM_QUANTILES,
        levels="midpoint",
        target=TARGETS[target],
        loss=DVPOLossConfig(kappa=0.0, coef={**OFF, **coef}, **loss),  # type: ignore[arg-type]
        statistic=statistic,
        average=average,
    )


# What `algorithm=NAME` trains, and the quantile ensemble with its choices taken one at a time.
FAMILIES: dict[str, Setup] = {
    "ppo": Setup(ScalarFamily),
    "ppo_ensemble": Setup(lambda: ScalarEnsembleFamily(num_heads=NUM_HEADS)),
    "robust_bellman": Setup(lambda: RobustBellmanFamily(num_heads=NUM_HEADS)),
    "dvpo": Setup(lambda: quantiles(levels="right", kappa=1.0, coef=DEFAULT_COEF)),
    "dvpo, token": Setup(lambda: quantiles(levels="right", kappa=1.0, coef=DEFAULT_COEF, constraint="token")),
    "dvpo_calibrated": Setup(lambda: quantiles("sr", coef=DEFAULT_COEF)),
    "quantile eq2": Setup(lambda: quantiles("eq2")),
    "quantile sr": Setup(lambda: quantiles("sr")),
    "quantile mc": Setup(lambda: quantiles("eq2"), lam=1.0),
}

SETUPS: dict[str, Setup] = dict(FAMILIES)

KAPPAS = (0.0, 0.01, 0.1, 1.0)
for _levels in ("right", "midpoint"):
    for _kappa in KAPPAS:
        SETUPS[f"{_levels}, kappa {_kappa:g}"] = Setup(
            lambda levels=_levels, kappa=_kappa: quantiles(levels=levels, kappa=kappa)  # type: ignore[misc]
        )

CONSTRAINT_COEF = {name: DEFAULT_COEF[name] for name in CONSTRAINT_TERMS}
FORMS = (
    ("tail", "mean"),
    ("tail", "blocks"),
    ("tail", "gated"),
    ("clipped", "mean"),
    ("capped", "mean"),
    ("median", "mean"),
    ("unbiased", "mean"),
    ("unbiased", "gated"),
    ("level", "mean"),
    ("level", "gated"),
)
for _target in TARGETS:
    # Each term at its default alone, and all of them.
    for _term in TERMS:
        SETUPS[f"{_target} + {_term}"] = Setup(
            lambda target=_target, term=_term: quantiles(target, coef={term: DEFAULT_COEF[term]})  # type: ignore[misc]
        )
    SETUPS[f"{_target} + all"] = Setup(lambda target=_target: quantiles(target, coef=DEFAULT_COEF))  # type: ignore[misc]
    # The five constraints at their defaults, in each form.
    for _statistic, _average in FORMS:
        SETUPS[f"{_target} + {_statistic}, {_average}"] = Setup(
            lambda target=_target, statistic=_statistic, average=_average: form(  # type: ignore[misc]
                target, statistic, average, CONSTRAINT_COEF
            )
        )
    # Spec section 4's run-away: every coefficient 0.1, per token and per batch; and `shift` by itself.
    for _mode in ("token", "batch"):
        for _label, _names in (("all", TERMS), ("shift", ("shift",))):
            SETUPS[f"{_target} {_mode}, {_label} 0.1"] = Setup(
                lambda target=_target, mode=_mode, names=_names: quantiles(  # type: ignore[misc]
                    target, coef=dict.fromkeys(names, 0.1), constraint=mode
                )
            )
            SETUPS[f"paper {_target} {_mode}, {_label} 0.1"] = Setup(
                lambda target=_target, mode=_mode, names=_names: quantiles(  # type: ignore[misc]
                    target, levels="right", kappa=1.0, coef=dict.fromkeys(names, 0.1), constraint=mode
                )
            )


def setup(name: str) -> Setup:
    """The critic called `name`.

    Raises:
        ValueError: no critic has that name.
    """
    if name not in SETUPS:
        raise ValueError(f"{name!r} is no critic of the lab; there are {', '.join(SETUPS)}")
    return SETUPS[name]
