# SPDX-License-Identifier: Apache-2.0
"""PIT, coverage and intervals against numbers worked by hand, and against scipy."""

import dataclasses

import numpy as np
import pytest
from pictures import made
from scipy import stats

from verl_dvpo.pictures import calibration as fit
from verl_dvpo.pictures.curves import t_band
from verl_dvpo.saved.values import LEVELS


def test_by_hand_where_returns_lie_between_at_and_beyond_the_levels():
    """Quantiles are their own levels. 0.3 is between 0.25 and 0.35; 0.25 is a quantile, so it spans two bars."""
    answers = [made.answer(reward, 1) for reward in (0.3, 0.25, -1.0, 2.0)]
    low, high = fit.pit_ends(np.stack([made.UNIFORM] * 4), np.array([0.3, 0.25, -1.0, 2.0]))
    assert low.tolist() == pytest.approx([0.25, 0.2, 0.0, 0.95])
    assert high.tolist() == pytest.approx([0.35, 0.3, 0.05, 1.0])
    tokens = fit.tokens_of(answers)
    shares = [share.value for share in fit.pit_shares(tokens)]
    assert shares == pytest.approx([0.25, 0, 0.125, 0.375, 0, 0, 0, 0, 0, 0, 0.25])
    # 50 %: 0.25 to 0.75 holds 0.3 and 0.25; 90 % the same two; 30 %: 0.35 to 0.65 holds none.
    assert [fit.coverage(tokens, band).value for band in (0.3, 0.5, 0.9)] == [0.0, 0.5, 0.5]


def test_a_reward_that_equals_many_quantiles_spans_them():
    """A critic that says 1 with probability 0.7 (levels to 0.25 are 0, the others 1) and is right: its PIT is flat."""
    two_points = (np.asarray(LEVELS) > 0.3).astype(float)
    low, high = fit.pit_ends(np.stack([two_points] * 2), np.array([1.0, 0.0]))
    assert low.tolist() == pytest.approx([0.3, 0.0])
    assert high.tolist() == pytest.approx([1.0, 0.3])
    tokens = fit.tokens_of([made.answer(reward, 1, quantiles=two_points) for reward in [1.0] * 7 + [0.0] * 3])
    assert [share.value for share in fit.pit_shares(tokens)] == pytest.approx(list(np.diff(fit.EDGES)))


@pytest.fixture(scope="module")
def drawn():
    """3,000 returns of answers of one to five tokens from a critic that is too narrow by a third, and not centred."""
    rng = np.random.default_rng(1)
    answers = []
    for _ in range(1000):
        length = int(rng.integers(1, 6))
        centre = rng.normal(size=(length, 1))
        realised = centre[:, 0] + 0.2 + 1.5 * rng.normal(size=length)
        quantiles = centre + stats.norm.ppf(LEVELS)
        answers.append(made.answer(0.0, length, quantiles=quantiles, realised=realised, values=centre[:, 0]))
    tokens = fit.tokens_of(answers)
    return tokens, stats.norm.cdf(tokens.realised - tokens.values)


def test_shares_and_coverage_are_those_of_scipys_distribution(drawn):
    tokens, level = drawn
    expected = np.histogram(level, fit.EDGES)[0] / len(level)
    assert [share.value for share in fit.pit_shares(tokens)] == pytest.approx(expected, abs=1e-12)
    for band in fit.BANDS:
        assert fit.coverage(tokens, band).value == pytest.approx((np.abs(level - 0.5) <= band / 2).mean(), abs=1e-12)
    assert fit.coverage(tokens, 0.9).value < 0.8  # and it shows that the critic is too narrow


def test_an_interval_of_answers_of_one_length_is_students():
    values = np.random.default_rng(2).normal(size=(12, 5))
    found = fit.mean_over(values.ravel(), np.repeat(np.arange(12), 5))
    expected = stats.ttest_1samp(values.mean(-1), 0.0).confidence_interval(0.95)
    assert found == pytest.approx((values.mean(), expected.low, expected.high))


def test_an_interval_of_ragged_answers_by_hand():
    """Two tokens of 1 and one of 0: mean 2/3, residuals ±2/3, variance 2·(8/9)/9, so the error is 4/9."""
    found = fit.mean_over(np.array([1.0, 1.0, 0.0]), np.array([4, 4, 9]))
    assert found == pytest.approx((2 / 3, 2 / 3 - 12.7062047 * 4 / 9, 2 / 3 + 12.7062047 * 4 / 9))


def test_one_answer_has_no_interval_and_none_has_no_mean():
    one = fit.mean_over(np.array([1.0, 3.0]), np.array([0, 0]))
    assert one.value == 2.0
    assert np.isnan([one.low, one.high]).all()
    assert np.isnan(fit.mean_over(np.zeros(0), np.zeros(0, int))).all()


def test_masked_tokens_and_empty_answers_do_not_count():
    answers = [made.answer(1.0, 5, mask=[1, 0, 0, 1, 1]), made.answer(0.0, 3, mask=[0, 0, 0]), made.answer(0.0, 1)]
    tokens = fit.tokens_of(answers)
    assert tokens.count == 2
    assert tokens.answers.tolist() == [0, 0, 0, 2]
    assert tokens.places.tolist() == pytest.approx([1 / 6, 1 / 2, 5 / 6, 1 / 2])
    assert fit.tokens_of([]).count == 0
    assert fit.reliability(fit.tokens_of([])) == fit.by_position(np.zeros(0), fit.tokens_of([])) == []


def test_reliability_groups_by_value_and_positions_by_place():
    answers = [
        made.answer(reward, 2, values=np.array([value, value])) for value, reward in ((0.1, 0), (0.1, 1), (0.9, 1))
    ]
    tokens = fit.tokens_of(answers)
    low, high = fit.reliability(tokens, parts=2)
    assert (low.at, low.estimate.value, low.tokens) == (pytest.approx(0.1), 0.5, 4)
    assert (high.at, high.estimate.value, high.tokens) == (pytest.approx(0.9), 1.0, 2)
    first, last = fit.by_position(np.array([1.0, 0, 1, 0, 1, 0]), tokens, parts=2)
    assert (first.at, first.estimate.value, last.at, last.estimate.value) == (0.25, 1.0, 0.75, 0.0)


def test_values_that_are_all_the_same_are_one_group():
    (only,) = fit.reliability(fit.tokens_of([made.answer(1.0), made.answer(0.0)]))
    assert (only.estimate.value, only.tokens) == (0.5, 8)


def test_a_scalar_critic_has_no_spread():
    line = made.answer(1.0, quantiles=np.full(11, 0.5))
    assert not fit.tokens_of([line]).spread
    assert fit.tokens_of([line, made.answer(1.0)]).spread
    assert fit.coverage(fit.tokens_of([dataclasses.replace(line, realised=np.full(4, 0.5))]), 0.9).value == 1.0


def test_bands_of_curves_are_students():
    values = np.random.default_rng(3).normal(size=(4, 6))
    low, high = t_band(values)
    for step in range(6):
        expected = stats.ttest_1samp(values[:, step], 0.0).confidence_interval(0.95)
        assert (low[step], high[step]) == pytest.approx((expected.low, expected.high))
    assert np.isnan(t_band(values[:1])).all()
