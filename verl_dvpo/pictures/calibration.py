# SPDX-License-Identifier: Apache-2.0
"""Measures whether a critic's distributions fit the returns that came: PIT, coverage, reliability, by position.

Each number has an interval that takes the tokens of an answer together, because they share their return.

Shape legend: L valid response tokens of all answers laid end to end, J quantile levels, G answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from verl_dvpo.saved.values import LEVELS, Answer

#: Ends of the bars of a PIT: the levels without the median, so that each bar's share is known without interpolation.
EDGES = (0.0, *(level for level in LEVELS if level != 0.5), 1.0)

#: Central shares whose ends are among the levels.
BANDS = (0.1, 0.3, 0.5, 0.7, 0.9)

#: Equal parts of an answer, first to last, and groups of equal size by value.
PARTS = 10

CONFIDENCE = 0.95

Array = NDArray[Any]


class Estimate(NamedTuple):
    """A mean over tokens with the ends of its 95 % interval; the ends are NaN below two answers."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Tokens:
    """The valid tokens of some answers.

    Attributes:
        quantiles: (L, J) at ``LEVELS``.
        values: (L,).
        realised: (L,) returns that came.
        places: (L,) in (0, 1), where among the valid tokens of its answer each stands.
        answers: (L,) number of each token's answer, 0 to G − 1.
    """

    quantiles: Array
    values: Array
    realised: Array
    places: Array
    answers: Array

    @property
    def count(self) -> int:
        """G, the answers with a valid token."""
        return len(np.unique(self.answers))

    @property
    def spread(self) -> bool:
        """True where some state has a distribution; a scalar critic has none."""
        return bool((self.quantiles[:, -1] > self.quantiles[:, 0]).any())


def tokens_of(answers: Sequence[Answer]) -> Tokens:
    """Lays the valid tokens of answers end to end."""
    valid = [answer.mask for answer in answers]
    sizes = [int(mask.sum()) for mask in valid]

    def joined(name: str, empty: Array) -> Array:
        rows = [np.asarray(getattr(answer, name), float)[mask] for answer, mask in zip(answers, valid, strict=True)]
        return np.concatenate([empty, *rows])

    return Tokens(
        quantiles=joined("quantiles", np.zeros((0, len(LEVELS)))),
        values=joined("values", np.zeros(0)),
        realised=joined("realised", np.zeros(0)),
        places=np.concatenate([np.zeros(0), *((np.arange(size) + 0.5) / max(size, 1) for size in sizes)]),
        answers=np.repeat(np.arange(len(sizes)), sizes),
    )


def mean_over(values: Array, answers: Array) -> Estimate:
    """Computes the mean over tokens with a t interval whose units are answers.

    With sums s_g and counts n_g of G answers the mean is m = Σ s_g / Σ n_g and its variance
    G/(G − 1) · Σ (s_g − m n_g)² / (Σ n_g)², that of a ratio. For answers of one length it is Student's interval of the
    answers' means.

    Args:
        values: (L,).
        answers: (L,) number of each token's answer.
    """
    from scipy import stats

    if not len(values):
        return Estimate(np.nan, np.nan, np.nan)
    _, inverse = np.unique(answers, return_inverse=True)
    counts = np.bincount(inverse)
    mean = float(values.mean())
    size = len(counts)
    if size < 2:
        return Estimate(mean, np.nan, np.nan)
    residuals = np.bincount(inverse, weights=values) - mean * counts
    error = float(np.sqrt(size / (size - 1) * (residuals**2).sum())) / len(values)
    reach = float(stats.t.ppf(0.5 + CONFIDENCE / 2, size - 1)) * error
    return Estimate(mean, mean - reach, mean + reach)


def pit_ends(quantiles: Array, realised: Array) -> tuple[Array, Array]:
    """Finds between which levels each return lies: the last level whose quantile is below it, the first above it.

    A return that equals quantiles, as a reward of 0 or 1 often does, spans their levels, and half the way to the next
    on either side, where the distribution's jump may begin and end.

    Args:
        quantiles: (L, J) ascending, at ``LEVELS``.
        realised: (L,).

    Returns:
        (L,) lower ends, from 0 on, and (L,) upper ends, to 1, each above its lower end.
    """
    below = (quantiles < realised[:, None]).sum(-1)
    up_to = (quantiles <= realised[:, None]).sum(-1)
    levels = np.asarray((0.0, *LEVELS, 1.0))
    low, high = levels[below], levels[up_to + 1]
    equal = up_to > below
    low = np.where(equal & (below > 0), (low + levels[below + 1]) / 2, low)
    high = np.where(equal & (up_to < len(LEVELS)), (high + levels[up_to]) / 2, high)
    return low, high


def pit_shares(tokens: Tokens) -> list[Estimate]:
    """Computes the share of returns in each bar between ``EDGES``; a return that spans bars is spread evenly over them.

    (The non-randomised PIT of Czado, Gneiting and Held 2009, on quantiles; paper.) For a calibrated critic each share
    is the bar's width.
    """
    low, high = pit_ends(tokens.quantiles, tokens.realised)
    found = []
    for left, right in pairwise(EDGES):
        overlap = np.clip(np.minimum(high, right) - np.maximum(low, left), 0.0, None) / (high - low)
        found.append(mean_over(overlap, tokens.answers))
    return found


def inside(tokens: Tokens, band: float) -> Array:
    """Tells for each token whether its return lies in the central ``band``, one of ``BANDS``, ends included: (L,)."""
    low = int(np.argmin(np.abs(np.asarray(LEVELS) - (0.5 - band / 2))))
    high = len(LEVELS) - 1 - low
    within = (tokens.quantiles[:, low] <= tokens.realised) & (tokens.realised <= tokens.quantiles[:, high])
    return within.astype(float)


def coverage(tokens: Tokens, band: float) -> Estimate:
    """Computes the share of returns in the central ``band``; of continuous returns a calibrated critic has ``band``."""
    return mean_over(inside(tokens, band), tokens.answers)


@dataclass(frozen=True)
class Part:
    """Some of the tokens: where they are, and what was measured on them."""

    at: float
    estimate: Estimate
    tokens: int


def reliability(tokens: Tokens, parts: int = PARTS) -> list[Part]:
    """Measures the mean return of tokens with about the same value, in groups of equal size; ``at`` is the mean value.

    Groups whose values are all the same become one.
    """
    if not len(tokens.values):
        return []
    ends = np.unique(np.quantile(tokens.values, np.linspace(0, 1, parts + 1)[1:-1]))
    group = np.searchsorted(ends, tokens.values, side="left")
    return [
        Part(float(tokens.values[mine].mean()), mean_over(tokens.realised[mine], tokens.answers[mine]), int(mine.sum()))
        for mine in (group == number for number in range(len(ends) + 1))
        if mine.any()
    ]


def by_position(measured: Array, tokens: Tokens, parts: int = PARTS) -> list[Part]:
    """Averages (L,) numbers in each of ``parts`` equal parts of an answer; ``at`` is the middle of the part."""
    place = np.minimum((tokens.places * parts).astype(int), parts - 1)
    return [
        Part((part + 0.5) / parts, mean_over(measured[mine], tokens.answers[mine]), int(mine.sum()))
        for part, mine in ((part, place == part) for part in range(parts))
        if mine.any()
    ]
