# SPDX-License-Identifier: Apache-2.0
"""Names the critics that the lab trains: family, target kind, levels, κ, terms, form of the constraints.

A new family of the package appears in ``FAMILIES`` without an edit here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from verl_dvpo.distributional import CONSTRAINT_TERMS, TERMS
from verl_dvpo.distributional.automatic import AUTO, AutoConfig
from verl_dvpo.distributional.config import DEFAULT_COEF, DEFAULT_LEVEL_COEF, LEVEL_TERMS
from verl_dvpo.families.base import ValueFamily
from verl_dvpo.families.quantile_ensemble import QuantileEnsembleConfig, QuantileEnsembleFamily
from verl_dvpo.families.registry import build_family, family_names, family_settings

from .forms import STATISTICS, ConstraintFormFamily

#: Quantiles M and heads N in the lab: M of docs/method.md, section 4, N of the paper.
NUM_QUANTILES = 50
NUM_HEADS = 3

OFF: Mapping[str, float] = dict.fromkeys(TERMS, 0.0)
TARGETS = {"eq2": "quantile_gae", "sr": "sample_replacement"}


@dataclass(frozen=True)
class Setup:
    """A critic of the lab.

    Attributes:
        build: makes the family.
        lam: trace λ of its targets; None for the run's.
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
    statistics: str = "value",
    num_quantiles: int | str = NUM_QUANTILES,
    risk: float | str | None = None,
) -> QuantileEnsembleFamily:
    """Returns a quantile ensemble; terms that ``coef`` does not name are off. ``risk`` is that of the readout."""
    readout = {} if risk is None else {"risk": risk}
    return QuantileEnsembleFamily(
        QuantileEnsembleConfig(
            num_heads=NUM_HEADS,
            num_quantiles=num_quantiles,
            levels=levels,
            target=TARGETS[target],
            kappa=kappa,
            constraint=constraint,
            constraint_statistics=statistics,
            risk_form="separable" if risk is None else "readout",
            coef={**OFF, **coef, **readout},
        )
    )


def form(
    statistic: str,
    average: str = "mean",
    *,
    target: str = "eq2",
    coef: Mapping[str, float],
    levels: str = "midpoint",
    kappa: float = 0.0,
) -> ConstraintFormFamily:
    """Returns a quantile ensemble whose constraints take another form; terms that ``coef`` does not name are off."""
    settings = QuantileEnsembleConfig(
        num_heads=NUM_HEADS,
        num_quantiles=NUM_QUANTILES,
        levels=levels,
        target=TARGETS[target],
        kappa=kappa,
        coef={**OFF, **coef},
    )
    return ConstraintFormFamily(settings, statistic=statistic, average=average)


def shipped(family: str, **settings: Any) -> Setup:
    """A family by its registered name; fields that `settings` leaves out keep their default."""
    return Setup(lambda: build_family(family_settings(family, **settings)))


#: The critics of ``algorithm=NAME``, and the quantile ensemble with its choices one at a time.
FAMILIES: dict[str, Setup] = {
    "ppo": shipped("scalar"),
    "ppo_ensemble": shipped("scalar_ensemble", num_heads=NUM_HEADS),
    "robust_bellman": shipped("robust_bellman", num_heads=NUM_HEADS, heads_see="bootstrap"),
    "robust_bellman, shards": shipped("robust_bellman", num_heads=NUM_HEADS, heads_see="shards"),
    "robust_bellman, all": shipped("robust_bellman", num_heads=NUM_HEADS),
    "dvpo": Setup(lambda: quantiles(levels="right", kappa=1.0, coef=DEFAULT_COEF)),
    "dvpo, token": Setup(lambda: quantiles(levels="right", kappa=1.0, coef=DEFAULT_COEF, constraint="token")),
    "dvpo_calibrated": Setup(lambda: quantiles("sr", coef=DEFAULT_LEVEL_COEF, statistics="level")),
    "quantile eq2": Setup(quantiles),
    "quantile sr": Setup(lambda: quantiles("sr")),
    "quantile mc": Setup(quantiles, lam=1.0),
    "dfpo": shipped("value_flow"),
}
#: The families above; any other that the package has goes by its own name, with its defaults.
LISTED = ("scalar", "scalar_ensemble", "robust_bellman", "quantile_ensemble", "value_flow")
FAMILIES |= {name: shipped(name) for name in family_names() if name not in LISTED}

KAPPAS = (0.0, 0.1, 1.0)
#: The starting coefficients of docs/method.md, section 4, with which every term and form is tried.
START_COEF = {**dict.fromkeys(TERMS, 0.1), **dict.fromkeys(CONSTRAINT_TERMS, 0.02)}
CONSTRAINT_COEF = {name: START_COEF[name] for name in CONSTRAINT_TERMS}
LEVEL_COEF = {name: START_COEF[name] for name in LEVEL_TERMS}
#: Constraints whose shipped coefficient with ``constraint_statistics: value`` is neither the starting one nor 0.
LOWERED = tuple(name for name in CONSTRAINT_TERMS if DEFAULT_COEF[name] not in (0.0, START_COEF[name]))
FORMS = (
    *((statistic, "mean") for statistic in STATISTICS),
    ("tail", "blocks"),
    ("tail", "gated"),
    ("unbiased", "blocks"),
    ("unbiased", "gated"),
    ("level", "gated"),
    ("tail", "signed"),
    ("unbiased", "signed"),
    ("level", "signed"),
)
#: Settings that the terms are added to: ``paper`` are those of ``dvpo``, ``sr`` those of ``dvpo_calibrated``.
BASES: dict[str, dict[str, Any]] = {
    "eq2": {"target": "eq2"},
    "sr": {"target": "sr"},
    "paper": {"target": "eq2", "levels": "right", "kappa": 1.0},
}


def _ablations() -> dict[str, Setup]:
    """Returns the ablations: κ and levels, each term alone, forms and modes of the constraints."""
    # partial: a lambda in a loop would see the last value of the loop's variable
    made: dict[str, Callable[[], ValueFamily]] = {}
    for levels in ("right", "midpoint"):
        for kappa in KAPPAS:
            made[f"{levels}, kappa {kappa:g}"] = partial(quantiles, levels=levels, kappa=kappa)
    for base, settings in BASES.items():
        plain = partial(quantiles, **settings)
        made[f"quantile {base}"] = plain
        for term in TERMS:
            made[f"{base} + {term}"] = partial(plain, coef={term: START_COEF[term]})
        for term in LOWERED:
            made[f"{base} + {term} {DEFAULT_COEF[term]:g}"] = partial(plain, coef={term: DEFAULT_COEF[term]})
        made[f"{base} + all"] = partial(plain, coef=START_COEF)
        made[f"{base} + all, small"] = partial(plain, coef=DEFAULT_COEF)
        for statistic, average in FORMS:
            coef = LEVEL_COEF if statistic == "level" else CONSTRAINT_COEF
            made[f"{base} + {statistic}, {average}"] = partial(form, statistic, average, **settings, coef=coef)
        # The core has signed levels for midpoints; with right levels they are a form that is only explored.
        signed: Callable[..., ValueFamily] = partial(form, "level", "signed", **settings)
        made[f"{base} + level shape"] = partial(signed, coef={"shape": START_COEF["shape"]})
        if settings.get("levels") != "right":
            signed = partial(plain, statistics="level")
        made[f"{base} + level, signed"] = partial(signed, coef=LEVEL_COEF)
        made[f"{base} + level x 5, signed"] = partial(signed, coef={k: 5 * v for k, v in LEVEL_COEF.items()})
        for term in LEVEL_TERMS:
            made[f"{base} + level {term}"] = partial(signed, coef={term: DEFAULT_LEVEL_COEF[term]})
        made[f"{base} + all, levels"] = partial(signed, coef=DEFAULT_LEVEL_COEF)
        for label, terms in (("all", TERMS), ("shift", ("shift",))):
            for mode in ("token", "batch"):
                made[f"{base} {mode}, {label} 0.1"] = partial(plain, coef=dict.fromkeys(terms, 0.1), constraint=mode)
    return {name: Setup(build) for name, build in made.items()}


#: What the automatic choices choose among, and the choices themselves.
_WITH_AUTO: dict[str, tuple[Any, ...]] = {name: (*getattr(AutoConfig(), name), AUTO) for name in ("sizes", "risks")}
SIZES = {
    f"{base}, M {size}": Setup(partial(quantiles, **BASES[base], num_quantiles=size))
    for base in ("sr", "paper")
    for size in _WITH_AUTO["sizes"]
}
RISKS = {
    f"{base}, risk {risk}": Setup(partial(quantiles, **BASES[base], risk=risk))
    for base in ("sr", "paper")
    for risk in _WITH_AUTO["risks"]
}

SETUPS: dict[str, Setup] = FAMILIES | _ablations() | SIZES | RISKS


def setup(name: str) -> Setup:
    """Returns the critic called ``name``.

    Raises:
        ValueError: no critic has that name.
    """
    if name not in SETUPS:
        raise ValueError(f"critic is {name!r}; allowed are {', '.join(SETUPS)}; choose one of them")
    return SETUPS[name]
