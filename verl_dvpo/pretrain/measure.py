# SPDX-License-Identifier: Apache-2.0
"""Measures a critic on held-out returns: CRPS, explained variance by position, calibration.

Shape legend: L tokens, D outputs of the head, K points of a distribution.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from verl_dvpo.distributional.metrics import (
    coverage,
    crps,
    explained_variance,
    explained_variance_sums,
    pit,
)
from verl_dvpo.families.base import SampledFamily, ValueFamily

#: Equal parts of a response, first to last, each with an explained variance of its own.
PARTS = 10

#: Steps of the curve of calibration, and points of a family without samples.
STEPS, POINTS = 20, 100


@dataclass(frozen=True)
class Measured:
    """A critic's score on some tokens.

    Attributes:
        crps: mean continuous ranked probability score, in units of reward; lower is better.
        explained_variance: of the returns by the values, at most 1; verl's formula.
        by_position: the same in each tenth of a response, first to last; NaN where there are fewer than two tokens.
        calibration: share of tokens whose return lies below each of 19 levels, 1/20 to 19/20; equal to the levels
            for a calibrated critic of a continuous return.
        coverage: share of tokens whose return lies in the central 80 %.
        tokens: L.
    """

    crps: float
    explained_variance: float
    by_position: tuple[float, ...]
    calibration: tuple[float, ...]
    coverage: float
    tokens: int

    def line(self) -> str:
        """Returns the two scores in one line."""
        return f"held-out CRPS {self.crps:.4f}, explained variance {self.explained_variance:.3f}"

    def plain(self) -> dict[str, Any]:
        """Returns all of it as JSON holds it; NaN becomes None."""
        values = [None if value != value else value for value in self.by_position]
        return {**self.__dict__, "by_position": values, "calibration": list(self.calibration)}


def measure(family: ValueFamily, outputs: Tensor, returns: Tensor, places: Tensor) -> Measured:
    """Measures outputs against realised returns.

    Args:
        family: gives the outputs their meaning.
        outputs: (L, D).
        returns: (L,).
        places: (L,) in (0, 1), where in its response each token stands.
    """
    points = points_of(family, outputs)
    values = family.value(outputs)
    everywhere = torch.ones_like(returns)
    parts = (places * PARTS).long().clamp(0, PARTS - 1)
    by_position = [
        float(explained_variance(explained_variance_sums(values, returns, (parts == part).float())))
        for part in range(PARTS)
    ]
    transformed = pit(points, returns).double()
    levels = torch.arange(1, STEPS, dtype=torch.float64) / STEPS
    return Measured(
        crps=float(crps(points, returns).double().mean()),
        explained_variance=float(explained_variance(explained_variance_sums(values, returns, everywhere))),
        by_position=tuple(by_position),
        calibration=tuple((transformed.unsqueeze(-1) <= levels).double().mean(0).tolist()),
        coverage=float(coverage(points, returns).double().mean()),
        tokens=len(returns),
    )


def points_of(family: ValueFamily, outputs: Tensor) -> Tensor:
    """(L, D) -> (L, K): equally weighted points of each distribution, ascending."""
    if isinstance(family, SampledFamily):
        return family.samples(outputs)
    levels = (torch.arange(POINTS, device=outputs.device) + 0.5) / POINTS
    return family.quantiles(outputs, levels)
