# SPDX-License-Identifier: Apache-2.0
"""Computes bootstrap intervals over runs with scipy, after Agarwal et al. 2021 (arXiv 2108.13264).

For few runs there are t intervals and exact tests: ``verl_dvpo.bench.statistics``.

Shapes: S strata (tasks and noises: conditions that are held fixed), R_s runs in stratum s (seeds). A bootstrap
resamples runs within each stratum, never strata; its intervals are percentiles. There is no interval where a stratum
has fewer than two runs.
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats

from verl_dvpo.bench.statistics import CONFIDENCE, Estimate

RESAMPLES = 5000
#: Share that is cut on either side for the interquartile mean.
QUARTER = 0.25
#: Fewer runs have no interquartile mean: nothing would be cut, so that it would be the mean.
FEWEST = 4


def trimmed_mean(runs: np.ndarray, axis: int = -1) -> np.ndarray:
    """Returns the mean of the middle half along an axis; whole runs are cut, of 4 to 7 the best and the worst."""
    return stats.trim_mean(runs, QUARTER, axis=axis)


def interquartile_mean(strata: Sequence[np.ndarray]) -> Estimate:
    """Returns the interquartile mean (IQM) of all runs together: strata of (R_s,) -> estimate.

    Raises:
        ValueError: there are fewer than ``FEWEST`` runs.
    """
    if sum(runs.size for runs in strata) < FEWEST:
        raise ValueError(f"runs is {sum(runs.size for runs in strata)}; an IQM needs at least {FEWEST}; use the mean")

    def statistic(*runs: np.ndarray, axis: int = -1) -> np.ndarray:
        return trimmed_mean(np.concatenate(runs, axis=axis), axis=axis)

    return _bootstrap(strata, statistic)


def paired_difference(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> Estimate:
    """Returns the IQM of first minus second, run by run: strata of (R_s,), paired by position.

    Runs of one seed have the same data in the same order, so that much of their luck cancels.
    """
    return interquartile_mean([a - b for a, b in zip(first, second, strict=True)])


def probability_of_improvement(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> Estimate:
    """Returns P(a run of ``first`` scores above a run of ``second``), ties by half, averaged over strata.

    It is the Mann-Whitney statistic divided by the number of pairs. Each resample takes the same seeds of both.

    Raises:
        ValueError: the two have different numbers of runs in a stratum.
    """
    for a, b in zip(first, second, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"runs is {a.size} and {b.size}; runs must be paired by seed; drop those without a pair")

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
