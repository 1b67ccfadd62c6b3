# SPDX-License-Identifier: Apache-2.0
"""The token process: dynamic programming against enumeration of every sequence, and simulation against both."""

import itertools

import numpy as np
import pytest
from scipy import stats

from verl_dvpo.bench.lab import process as lab


def small(up: float) -> lab.TokenProcess:
    """4 tokens, 3 possible rewards with arbitrary probabilities at each end."""
    probs = np.random.default_rng(5).dirichlet(np.ones(3), size=5)
    return lab.TokenProcess("small", np.array([-1.0, 0.25, 2.0]), probs, up)


def state_index(t: int, ups: int) -> int:
    return sum(range(t + 1)) + ups


@pytest.mark.parametrize("up", [0.5, 0.3])
def test_truth_and_visits_equal_the_enumeration_of_all_sequences(up: float) -> None:
    process = small(up)
    truth, visits = np.zeros((10, 3)), np.zeros(10)
    reached = np.zeros(10)
    for tokens in itertools.product((0, 1), repeat=4):
        p = np.prod([up if token else 1 - up for token in tokens])
        for t in range(4):
            state = state_index(t, sum(tokens[:t]))
            truth[state] += p * process.end_probs[sum(tokens)]
            reached[state] += p
            visits[state] += p / 4
    np.testing.assert_allclose(process.truth(), truth / reached[:, None], atol=1e-12)
    np.testing.assert_allclose(process.visits(), visits, atol=1e-12)


def test_start_value_of_the_walk_by_hand() -> None:
    # 3 fair steps: x_3 > 0 for 2 or 3 ups, probability (3 + 1)/8; after one up it is 1 − 1/4.
    process = lab.bernoulli_walk(3)
    values = process.truth() @ process.atoms
    np.testing.assert_allclose(values[:3], [0.5, 0.25, 0.75])


def test_skewed_reward_has_the_exponential_s_tail() -> None:
    process = lab.skewed_walk(9, points=64)
    assert process.end_probs.sum(1) == pytest.approx(np.ones(10))
    means = process.end_probs @ process.atoms
    # 64 midpoint quantiles of Exp(1) have mean 1 − 0.005, so the mean is x/9 within 0.3·0.006.
    np.testing.assert_allclose(means, np.arange(-9, 10, 2) / 9, atol=0.002)


@pytest.mark.parametrize("name", ["bernoulli", "skewed"])
def test_simulated_returns_follow_the_truth(name: str) -> None:
    process = lab.PROCESSES[name]()
    states, rewards = process.sample(20_000, np.random.default_rng(0))
    truth = process.truth()
    for state in (0, state_index(3, 2), state_index(8, 4)):
        mine = rewards[(states == state).any(1)]
        cdf = truth[state].cumsum()

        def at(y: np.ndarray, cdf: np.ndarray = cdf) -> np.ndarray:
            return np.concatenate([[0.0], cdf])[np.searchsorted(process.atoms, y, side="right")]

        # For a discrete distribution the Kolmogorov-Smirnov distance is taken at the atoms; its p-value is then
        # an upper bound of the level, so a small one still refutes.
        distance = np.abs(np.searchsorted(np.sort(mine), process.atoms, side="right") / mine.size - at(process.atoms))
        assert stats.kstwobign.sf(distance.max() * np.sqrt(mine.size)) > 0.01


def test_states_are_visited_as_often_as_computed() -> None:
    process = lab.TokenProcess("tilted", np.array([0.0, 1.0]), lab.bernoulli_walk(5).end_probs, up=0.7)
    states, _ = process.sample(20_000, np.random.default_rng(1))
    counted = np.bincount(states.ravel(), minlength=process.num_states) / states.size
    np.testing.assert_allclose(counted, process.visits(), atol=0.004)


def test_corruption() -> None:
    clean = np.random.default_rng(2).integers(0, 2, 40_000).astype(float)
    atoms = np.array([0.0, 1.0])
    rng = np.random.default_rng(3)
    np.testing.assert_array_equal(lab.corrupt(clean, "clean", atoms, rng), clean)
    flipped = lab.corrupt(clean, "flip", atoms, rng)
    assert set(flipped) == {0.0, 1.0}
    # standard error of a share of 0.3 over 40,000: 0.0023
    assert (flipped != clean).mean() == pytest.approx(0.3, abs=0.01)
    noise = lab.corrupt(clean, "heavy", atoms, rng) - clean
    share = stats.t.sf(3.0, lab.HEAVY_DF) * 2
    assert (np.abs(noise) > 3.0 * lab.HEAVY_SCALE).mean() == pytest.approx(share, abs=0.01)
    assert np.median(noise) == pytest.approx(0.0, abs=0.01)


def test_flipped_process_is_what_flipped_rewards_follow() -> None:
    process = lab.bernoulli_walk(4)
    # P(x_4 > 0) = 5/16, seen as 0.7·5/16 + 0.3·11/16
    assert process.corrupted("flip").truth()[0] == pytest.approx([0.575, 0.425])
    assert process.corrupted("heavy") is process


def test_bad_noise_is_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="noise is 'loud'"):
        lab.corrupt(np.zeros(2), "loud", np.array([0.0, 1.0]), rng)
    with pytest.raises(ValueError, match="noise is 'flip'; it needs a reward of 2 values, not 3"):
        lab.corrupt(np.zeros(2), "flip", np.array([0.0, 1.0, 2.0]), rng)
