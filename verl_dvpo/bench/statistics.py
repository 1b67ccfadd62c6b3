# SPDX-License-Identifier: Apache-2.0
"""Computes means with confidence intervals over few seeds, and exact tests; scipy does the work.

Shapes: R runs (seeds).
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

#: Of every interval in the workbench.
CONFIDENCE = 0.95
#: Up to this many sign patterns the permutation test is exact (16 seeds); beyond, it draws as many at random.
PATTERNS = 2**16


class Estimate(NamedTuple):
    """A number and the ends of its confidence interval; the ends are NaN where there is no interval."""

    value: float
    low: float
    high: float


def t_interval(runs: Sequence[float] | np.ndarray) -> Estimate:
    """Returns the mean of R values with Student's t interval; one value has no interval.

    A value that is not finite makes the mean infinite and the interval the whole line.
    """
    values = np.asarray(runs, dtype=float)
    if not np.isfinite(values).all():
        return Estimate(float("inf"), float("-inf"), float("inf"))
    mean = float(values.mean())
    if values.size < 2:
        return Estimate(mean, float("nan"), float("nan"))
    if np.ptp(values) == 0:
        return Estimate(mean, mean, mean)
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(CONFIDENCE)
    return Estimate(mean, float(low), float(high))


def ratio_interval(values: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Returns the ratio of two positive means over the same R seeds, ``mean(values) / mean(baseline)``.

    Seeds are paired, because equal seeds have equal data. The interval is the delta method's on the logarithm of the
    ratio, with t quantiles. A value that is not finite makes the ratio infinite and the interval the whole line.
    """
    v, b = np.asarray(values, dtype=float), np.asarray(baseline, dtype=float)
    if not (np.isfinite(v).all() and np.isfinite(b).all()):
        return Estimate(float("inf"), float("-inf"), float("inf"))
    ratio = float(v.mean() / b.mean())
    of_log = t_interval(v / v.mean() - b / b.mean())  # its mean is 0
    return Estimate(ratio, ratio * float(np.exp(of_log.low)), ratio * float(np.exp(of_log.high)))


def sign_flip_test(differences: Sequence[float] | np.ndarray) -> float:
    """Returns the two-sided p-value of R paired differences under the hypothesis that each sign is a fair coin.

    It is the share of the 2^R sign patterns whose mean is at least as far from 0 as the observed one, exact up to
    ``PATTERNS`` patterns. It cannot be below 2/2^R: 0.25 for three seeds, 0.0625 for five. NaN without two pairs.
    """
    values = np.asarray(differences, dtype=float)
    if values.size < 2 or not np.isfinite(values).all():
        return float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tested = stats.permutation_test(
            (values,),
            lambda flipped, axis: np.abs(np.mean(flipped, axis=axis)),
            permutation_type="samples",
            alternative="greater",
            n_resamples=PATTERNS,
            vectorized=True,
            rng=np.random.default_rng(0),
        )
    return float(tested.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns Holm's step-down corrected p-values of a family of tests, in the order given (Holm 1979).

    The k-th smallest of m is multiplied by m - k + 1 and is at least its predecessor, at most 1. They bound the
    probability of any false rejection, whatever the dependence of the tests. NaN counts as 1.
    """
    values = np.nan_to_num(np.asarray(p_values, dtype=float), nan=1.0)
    order = np.argsort(values, kind="stable")
    steps = np.maximum.accumulate(values[order] * np.arange(values.size, 0, -1))
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(steps, 1.0)
    return corrected.tolist()
