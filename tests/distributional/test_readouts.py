# SPDX-License-Identifier: Apache-2.0
"""Readouts against scipy, numbers by hand, and the claim that they commute with distributional GAE."""

import pytest
import torch
from scipy import stats

from verl_dvpo.distributional.readouts import cvar_between, cvar_level, read_out, readout_weights
from verl_dvpo.distributional.returns import distributional_gae


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 50, 200])
def test_readouts_of_points(size):
    points = torch.randn(6, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size)).sort(-1).values
    torch.testing.assert_close(read_out(points, "mean", 0.25), points.mean(-1))
    torch.testing.assert_close(read_out(points, "median", 0.25), points.quantile(0.5, dim=-1))
    for share in (0.1, 0.25):
        if (cut := round(share * size)) != share * size:
            continue
        expected = torch.from_numpy(stats.trim_mean(points.numpy(), share, axis=-1))
        torch.testing.assert_close(read_out(points, "trimmed", share), expected)
        torch.testing.assert_close(read_out(points, "cvar", share), points[:, :cut].mean(-1))
    torch.testing.assert_close(read_out(points, "cvar", 1.0), points.mean(-1))


def test_levels_between_two_points_by_hand():
    """Four points stand for quarters: the lowest 0.375 is the first quarter and half of the second."""
    third = 1.0 / 3.0
    expected = torch.tensor([2 * third, third, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(readout_weights(4, "cvar", 0.375), expected)
    expected = torch.tensor([1 / 6, 1 / 3, 1 / 3, 1 / 6], dtype=torch.float64)
    torch.testing.assert_close(readout_weights(4, "trimmed", 0.125), expected)
    assert readout_weights(5, "median", 0.1).tolist() == pytest.approx([0, 0, 1, 0, 0])
    assert readout_weights(4, "median", 0.1).tolist() == pytest.approx([0, 0.5, 0.5, 0])


@pytest.mark.parametrize(("readout", "level"), [("mean", 0.1), ("median", 0.1), ("trimmed", 0.13), ("cvar", 0.37)])
def test_a_readout_commutes_with_distributional_gae(readout, level):
    """Σ_j w_j A_t^j, by one loop for each quantile, is the GAE of Σ_j w_j θ_j; on a ragged mask with holes."""
    rng = torch.Generator().manual_seed(5)
    batch, length, size, gamma, lam = 5, 30, 11, 0.9, 0.8
    quantiles = torch.randn(batch, length, size, dtype=torch.float64, generator=rng).sort(-1).values
    rewards = torch.randn(batch, length, dtype=torch.float64, generator=rng)
    mask = (torch.rand(batch, length, generator=rng) > 0.3).long()
    mask[2, 13:] = 0
    weights = readout_weights(size, readout, level)
    assert weights.sum().item() == pytest.approx(1.0)
    assert (weights >= 0).all()
    expected = torch.zeros(batch, length, dtype=torch.float64)
    for b in range(batch):
        for j in range(size):
            running = following = 0.0
            for t in reversed(range(length)):
                if mask[b, t]:
                    error = rewards[b, t] + gamma * following - quantiles[b, t, j]
                    running = error + gamma * lam * running
                    following = quantiles[b, t, j]
                expected[b, t] += weights[j] * running
    value = read_out(quantiles, readout, level)
    _, got = distributional_gae(rewards, value[:, :, None], mask, gamma=gamma, lam=lam)
    torch.testing.assert_close(got, expected)
    assert got.abs().sum() > 1


def test_the_level_of_cvar_is_the_known_share_of_the_variance():
    mask = torch.tensor([[1, 0, 1], [1, 0, 0]])
    disagreement = torch.tensor([[1.0, 50.0, 2.0], [0.0, 7.0, 7.0]])
    sigma = torch.tensor([[2.0, 0.0, 1.0], [3.0, 0.0, 0.0]])
    assert cvar_level(disagreement, sigma, mask).item() == pytest.approx(1 - 5 / (5 + 14))
    assert cvar_level(0 * disagreement, sigma, mask).item() == 1.0
    assert cvar_level(disagreement, 0 * sigma, mask).item() == pytest.approx(0.1)
    assert cvar_level(0 * disagreement, 0 * sigma, mask).item() == 1.0
    assert cvar_level(disagreement, sigma, 0 * mask).item() == 1.0


@pytest.mark.parametrize(
    ("level", "expected"),
    [(0.1, 1.0), (0.175, 1.5), (0.25, 2.0), (0.3, 2.2), (0.5, 3.0), (0.6, 3.8), (1.0, 7.0)],
)
def test_cvar_between_its_levels(level, expected):
    values = torch.full((2, 3), 7.0)
    fields = {f"value_cvar_{n}": torch.full((2, 3), v) for n, v in ((10, 1.0), (25, 2.0), (50, 3.0))}
    found = cvar_between(torch.tensor(level, dtype=torch.float64), values, fields)
    torch.testing.assert_close(found, torch.full((2, 3), expected))


def test_a_median_of_the_advantages_does_not_commute():
    """γ = 1, λ = 0, no reward. First state: the quantiles' advantages are 7, 9, 7; the medians' is 10 − 1."""
    quantiles = torch.tensor([[[-7.0, 1.0, 4.0], [0.0, 10.0, 11.0]]])
    rewards, mask = torch.zeros(1, 2), torch.ones(1, 2)
    targets, _ = distributional_gae(rewards, quantiles, mask, gamma=1.0, lam=0.0)
    value = read_out(quantiles, "median", 0.25)
    _, of_the_median = distributional_gae(rewards, value[:, :, None], mask, gamma=1.0, lam=0.0)
    assert (targets - quantiles).median(-1).values[0, 0].item() == 7.0
    assert of_the_median[0, 0].item() == 9.0


@pytest.mark.parametrize(
    ("size", "readout", "level", "message"),
    [
        (0, "mean", 0.1, "size is 0; it must be at least 1"),
        (5, "mode", 0.1, "readout is 'mode'; it must be one of mean, median, trimmed, cvar"),
        (5, "trimmed", 0.5, r"level is 0.5; with readout 'trimmed' it must be in \(0, 0.5\)"),
        (5, "cvar", 0.0, r"level is 0.0; with readout 'cvar' it must be in \(0, 1\]"),
    ],
)
def test_bounds(size, readout, level, message):
    with pytest.raises(ValueError, match=message):
        readout_weights(size, readout, level)
