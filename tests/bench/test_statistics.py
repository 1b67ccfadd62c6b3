# SPDX-License-Identifier: Apache-2.0
"""Intervals and tests over few seeds against hand-worked numbers, enumeration and the bootstrap."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from verl_dvpo.bench.statistics import holm, ratio_interval, sign_flip_test, t_interval


def test_t_interval_by_hand():
    # {1, 2, 3, 6}: mean 3, s² = (4 + 1 + 0 + 9)/3, t_{0.975, 3} = 3.18245
    half = 3.182446 * (14 / 3) ** 0.5 / 2
    assert t_interval([1.0, 2.0, 3.0, 6.0]) == pytest.approx((3.0, 3.0 - half, 3.0 + half), rel=1e-5)
    # two values: t_{0.975, 1} = 12.7062, and the standard error is half their distance
    assert t_interval([0.0, 1.0]) == pytest.approx((0.5, 0.5 - 6.3531, 0.5 + 6.3531), rel=1e-4)


def test_t_interval_covers_95_percent_of_the_time():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        interval = t_interval(rng.normal(2.0, 3.0, size=3))
        inside += interval.low <= 2.0 <= interval.high
    # binomial: standard deviation 0.005
    assert inside / 2000 == pytest.approx(0.95, abs=0.02)


def test_extremes_of_the_t_interval():
    single = t_interval([0.5])
    assert single.value == 0.5
    assert math.isnan(single.low)
    assert math.isnan(single.high)
    assert t_interval([7.0, 7.0, 7.0]) == (7.0, 7.0, 7.0)
    assert t_interval([1.0, float("nan")]) == (math.inf, -math.inf, math.inf)


def test_ratio_interval_against_a_paired_bootstrap():
    rng = np.random.default_rng(1)
    common = rng.gamma(9.0, 0.1, 40)
    values, baseline = common * 1.2 + rng.normal(0, 0.05, 40), common + rng.normal(0, 0.05, 40)
    got = ratio_interval(values.tolist(), baseline.tolist())
    boot = stats.bootstrap(
        (values, baseline),
        lambda v, b, axis: v.mean(axis) / b.mean(axis),
        paired=True,
        method="percentile",
        n_resamples=4000,
        rng=np.random.default_rng(2),
    ).confidence_interval
    assert got.value == pytest.approx(values.mean() / baseline.mean())
    assert got.low == pytest.approx(boot.low, abs=0.01)
    assert got.high == pytest.approx(boot.high, abs=0.01)
    assert ratio_interval([1.0, float("inf")], [1.0, 1.0]).value == math.inf


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([0.1, 0.2, 0.3], 2 / 8),  # the observed signs and their opposites
        ([-0.1, -0.2, -0.3], 2 / 8),
        ([0.3, -0.1], 4 / 4),  # sums are ±0.2 and ±0.4, and 0.2 was observed
        ([0.5, 0.3, -0.1], 4 / 8),  # of 0.9, 0.7, 0.3, 0.1 in size the first two are as far as 0.7
        ([0.1, 0.1, 0.1, 0.1, 0.1], 2 / 32),
        ([0.0, 0.0, 0.0], 1.0),
    ],
)
def test_sign_flips_by_hand(differences, expected):
    assert sign_flip_test(differences) == pytest.approx(expected)


def test_sign_flips_against_enumeration():
    rng = np.random.default_rng(3)
    for size in (2, 3, 5, 8, 11):
        # steps of 0.05, so that sums tie
        differences = np.round(rng.normal(0.05, 0.2, size=size) * 20) / 20
        signs = np.array(list(itertools.product((1, -1), repeat=size)))
        far = np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12
        assert sign_flip_test(differences) == pytest.approx(far.mean())


def test_a_test_needs_two_finite_pairs():
    assert math.isnan(sign_flip_test([0.3]))
    assert math.isnan(sign_flip_test([0.3, float("inf")]))


def test_holm_by_hand():
    # four tests: 0.005 * 4, 0.01 * 3, 0.03 * 2, then 0.04 * 1 is below its predecessor and takes its value
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.4]) == [0.8, 0.8]
    assert holm([0.9, 0.9, 0.9]) == [1.0, 1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []
    assert holm([float("nan"), 0.01]) == [1.0, 0.02]


def test_holm_rejects_what_the_procedure_of_1979_rejects():
    """The procedure: go up from the smallest p-value, stop at the first one above alpha / (number that are left)."""
    rng = np.random.default_rng(4)
    for _ in range(200):
        values = rng.uniform(size=6) ** 3
        alpha = rng.uniform(0.01, 0.3)
        rejected = set()
        for place, test in enumerate(np.argsort(values)):
            if values[test] > alpha / (6 - place):
                break
            rejected.add(int(test))
        assert {test for test, p in enumerate(holm(values)) if p <= alpha} == rejected
