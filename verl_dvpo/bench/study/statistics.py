# SPDX-License-Identifier: Apache-2.0
"""Aggregates over few runs, after Agarwal et al. 2021 (arXiv 2108.13264); scipy computes them.

Shapes: S strata (tasks, corruptions: what is held fixed), R_s runs in stratum s (seeds). A bootstrap resamples runs
within each stratum and never strata; its intervals are percentiles at 95 %. With fewer than two runs in a stratum there
is no interval, and with three it is coarse: it can only be made of those three runs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 5000
#: Cut on either side of the interquartile mean.
QUARTER = 0.25


class Estimate(NamedTuple):
    """A number and the ends of its confidence interval; the ends are NaN where there is none."""

    value: float
    low: float
    high: float


def trimmed_mean(runs: np.ndarray, axis: int = -1) -> np.ndarray:
    """The mean of the middle half along an axis; whole runs are cut: of 3 none, of 4 the best and the worst."""
    return stats.trim_mean(runs, QUARTER, axis=axis)


def interquartile_mean(strata: Sequence[np.ndarray]) -> Estimate:
    """`trimmed_mean` of all runs together: strata of (R_s,) -> estimate."""

    def statistic(*runs: np.ndarray, axis: int = -1) -> np.ndarray:
        return trimmed_mean(np.concatenate(runs, axis=axis), axis=axis)

    return _bootstrap(strata, statistic)


def paired_difference(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> Estimate:
    """Interquartile mean over runs of first minus second, run by run: strata of (R_s,), paired by position.

    Runs of one seed have the same data in the same order, so that much of their luck cancels.
    """
    return interquartile_mean([a - b for a, b in zip(first, second, strict=True)])


def probability_of_improvement(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> Estimate:
    """P(a run of `first` scores above a run of `second`), ties by half, averaged over strata.

    It is the Mann-Whitney statistic over the number of pairs. Each resample takes the same seeds of both.
    """
    for a, b in zip(first, second, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"runs must be paired by seed, got {a.shape} and {b.shape}")

    def statistic(*chosen: np.ndarray, axis: int = -1) -> np.ndarray:
        each = []
        for a, b, index in zip(first, second, chosen, strict=True):
            seeds = np.moveaxis(index.astype(int), axis, -1)
            u = stats.mannwhitneyu(a[seeds], b[seeds], axis=-1, method="asymptotic").statistic
            each.append(u / a.size**2)
        return np.mean(each, axis=0)

    return _bootstrap([np.arange(a.size) for a in first], statistic)


def _bootstrap(strata: Sequence[np.ndarray], statistic) -> Estimate:
    value = float(statistic(*strata, axis=-1))
    if any(runs.size < 2 for runs in strata):
        return Estimate(value, float("nan"), float("nan"))
    if all(np.ptp(runs) == 0 for runs in strata):
        return Estimate(value, value, value)
    interval = stats.bootstrap(
        tuple(strata),
        statistic,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high))
