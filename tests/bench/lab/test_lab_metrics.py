# SPDX-License-Identifier: Apache-2.0
"""The lab's exact metrics against sums written out, integrals on a grid, and the core's own metrics."""

import numpy as np
import pytest
import torch
from scipy import stats

from verl_dvpo import distributional
from verl_dvpo.bench.lab import metrics
from verl_dvpo.bench.lab.process import TokenProcess, bernoulli_walk, skewed_walk


@pytest.fixture
def process() -> TokenProcess:
    probs = np.random.default_rng(1).dirichlet(np.ones(4), size=4)
    return TokenProcess("small", np.array([-1.5, 0.0, 0.4, 3.0]), probs, up=0.4)


@pytest.fixture
def samples(process: TokenProcess) -> np.ndarray:
    drawn = np.random.default_rng(2).normal(size=(2, process.num_states, 10)) * 1.5
    drawn[0, 0, 3] = 0.4  # a tie with an atom
    return np.sort(drawn, -1)


def test_crps_excess_is_the_expected_crps_above_the_truth_s(process: TokenProcess, samples: np.ndarray) -> None:
    truth = process.truth()
    got = metrics.cdf_distance(samples, truth, process.atoms)
    for run in range(2):
        for state in range(process.num_states):
            y = torch.from_numpy(process.atoms)
            mine = torch.from_numpy(samples[run, state]).expand(4, -1)
            expected = float(distributional.crps(mine, y).numpy() @ truth[state])
            pairs = np.abs(process.atoms[:, None] - process.atoms[None])
            own = 0.5 * truth[state] @ pairs @ truth[state]
            assert got[run, state] == pytest.approx(expected - own, abs=1e-12)


def test_crps_excess_is_the_integral_of_the_squared_distance(process: TokenProcess, samples: np.ndarray) -> None:
    grid = np.linspace(-8, 8, 160_001)
    middle = 0.5 * (grid[1:] + grid[:-1])
    mine = np.searchsorted(samples[0, 2], middle, side="right") / 10
    true = np.concatenate([[0], process.truth()[2].cumsum()])[np.searchsorted(process.atoms, middle, side="right")]
    integral = ((mine - true) ** 2).sum() * (grid[1] - grid[0])
    assert metrics.cdf_distance(samples, process.truth(), process.atoms)[0, 2] == pytest.approx(integral, abs=1e-3)


def test_coverage_is_the_expectation_of_the_core_s(process: TokenProcess, samples: np.ndarray) -> None:
    got = metrics.coverage_probability(samples, process.truth(), process.atoms)
    y = torch.from_numpy(np.broadcast_to(process.atoms, (2, process.num_states, 4)).copy())
    inside = distributional.coverage(torch.from_numpy(samples)[:, :, None].expand(-1, -1, 4, -1), y, 0.8).numpy()
    np.testing.assert_allclose(got, (inside * process.truth()).sum(-1), atol=1e-12)


def test_tail_means_of_the_truth() -> None:
    # Lowest 10 % of {0: 0.04, 1: 0.9, 5: 0.06}: (0.04·0 + 0.06·1)/0.1; highest: (0.06·5 + 0.04·1)/0.1.
    low, up = metrics.true_tail_means(np.array([[0.04, 0.9, 0.06]]), np.array([0.0, 1.0, 5.0]))
    assert (low[0], up[0]) == (pytest.approx(0.6), pytest.approx(3.4))


def test_evaluate_weights_states_by_visits(process: TokenProcess, samples: np.ndarray) -> None:
    got = metrics.evaluate(samples, process)
    truth, atoms, weight = process.truth(), process.atoms, process.visits()
    squared = low = bias = spread = true_spread = 0.0
    for state in range(process.num_states):
        value = sum(truth[state, a] * atoms[a] for a in range(4))
        mean = sum(samples[1, state]) / 10
        squared += weight[state] * (mean - value) ** 2
        low_true = metrics.true_tail_means(truth, atoms)[0][state]
        # 10 points, share 0.1: the tail is the first point
        low += weight[state] * abs(samples[1, state, 0] - low_true)
        bias += weight[state] * (samples[1, state, -1] - metrics.true_tail_means(truth, atoms)[1][state])
        spread += weight[state] * np.std(samples[1, state])
        true_spread += weight[state] * np.sqrt(sum(truth[state] * (atoms - value) ** 2))
    assert got["v_error"][1] == pytest.approx(squared**0.5)
    assert got["lower_tail_error"][1] == pytest.approx(low)
    assert got["upper_tail_bias"][1] == pytest.approx(bias)
    assert got["spread_ratio"][1] == pytest.approx(spread / true_spread)
    assert set(got) == set(metrics.METRICS)


def test_error_to_what_was_seen_under_flips() -> None:
    process = bernoulli_walk(4)
    seen = (process.corrupted("flip").truth() @ process.atoms)[None, :, None]
    got = metrics.evaluate(seen, process, "flip")
    assert got["v_error_seen"][0] == pytest.approx(0.0, abs=1e-12)
    # seen − clean = 0.3·(1 − 2V)
    clean = process.truth() @ process.atoms
    assert got["v_error"][0] == pytest.approx(0.3 * np.sqrt((1 - 2 * clean) ** 2 @ process.visits()))


def test_exact_quantiles_score_nearly_nothing() -> None:
    process = skewed_walk()
    got = metrics.evaluate(metrics.true_samples(process, 2000), process)
    assert got["v_error"][0] < 1e-3
    assert got["crps_excess"][0] < 1e-5
    assert got["coverage_80"][0] == pytest.approx(0.8, abs=0.02)  # the truth has atoms
    assert got["lower_tail_error"][0] < 2e-3
    assert got["spread_ratio"][0] == pytest.approx(1.0, abs=1e-3)


def test_quantiles_that_were_seen() -> None:
    # A process of one atom: the reward seen is 2 + 0.3·t.
    process = TokenProcess("one", np.array([2.0]), np.ones((3, 1)))
    quantiles = metrics.seen_quantiles(process, "heavy", 50)
    levels = (np.arange(50) + 0.5) / 50
    np.testing.assert_allclose(quantiles[1], stats.t.ppf(levels, 1.5, loc=2.0, scale=0.3), rtol=1e-3)
    clean = metrics.seen_quantiles(bernoulli_walk(3), "flip", 10)
    # Start: P(1) = 0.7·0.5 + 0.3·0.5; after two downs: 0.3, so 7 zeros.
    assert clean[0].tolist() == [0.0] * 5 + [1.0] * 5
    assert clean[3].tolist() == [0.0] * 7 + [1.0] * 3


def test_interval_ends_that_equal_a_return_are_inside() -> None:
    truth, atoms = np.array([[0.7, 0.3]]), np.array([0.0, 1.0])
    points = np.array([[[0.0, 0.0, 0.0]], [[1.0, 1.0, 1.0]], [[0.0, 0.5, 1.0]]])
    assert metrics.coverage_probability(points[:2], truth, atoms).ravel() == pytest.approx([0.7, 0.3])
    # Three points stand at 1/6, 1/2, 5/6: the 10 % and 90 % quantiles are the end points.
    assert metrics.coverage_probability(points[2:], truth, atoms).ravel() == pytest.approx([1.0])
