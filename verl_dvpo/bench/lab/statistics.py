# SPDX-License-Identifier: Apache-2.0
"""Confidence intervals over seeds, at 95 %.

Shapes: R runs (seeds).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean and the ends of its confidence interval."""

    mean: float
    low: float
    high: float


def t_interval(values: Sequence[float]) -> Interval:
    """(R,) -> mean with Student's t interval, R ≥ 2; infinite if a value is not finite."""
    v = np.asarray(values, dtype=float)
    if not np.isfinite(v).all():
        return Interval(float("inf"), float("-inf"), float("inf"))
    mean, error = float(v.mean()), float(v.std(ddof=1) / v.size**0.5)
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, v.size - 1)) * error
    return Interval(mean, mean - half, mean + half)


def ratio_interval(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """Ratio of two positive means over the same seeds: (R,), (R,) -> interval of mean(values)/mean(baseline).

    Seeds are paired (same sequences), so most of their noise cancels: the delta method on log ratio, with t quantiles.
    """
    v, b = np.asarray(values, dtype=float), np.asarray(baseline, dtype=float)
    if not (np.isfinite(v).all() and np.isfinite(b).all()):
        return Interval(float("inf"), float("-inf"), float("inf"))
    ratio = float(v.mean() / b.mean())
    influence = v / v.mean() - b / b.mean()
    error = float(influence.std(ddof=1) / v.size**0.5)
    factor = float(np.exp(stats.t.ppf(0.5 + CONFIDENCE / 2, v.size - 1) * error))
    return Interval(ratio, ratio / factor, ratio * factor)
