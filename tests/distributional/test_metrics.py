# SPDX-License-Identifier: Apache-2.0
"""The metrics against hand-worked numbers, scipy, their definitions in numpy, and verl's formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from verl_dvpo.distributional import (
    coverage,
    crossing_fraction,
    crps,
    ensemble_std,
    explained_variance,
    explained_variance_sums,
    masked_sums,
    pit,
    spread,
    tail_mean,
)


def test_crossing_fraction_by_hand():
    # 1>2 no, 2>0 yes, 0>0 no (equal is in order), so 1 of 3; the second row 3 of 3
    quantiles = torch.tensor([[1.0, 2, 0, 0], [4, 3, 2, 1]])
    assert crossing_fraction(quantiles).tolist() == pytest.approx([1 / 3, 1.0])
    assert crossing_fraction(torch.zeros(2, 1)).tolist() == [0.0, 0.0]
    assert crossing_fraction(quantiles[None].bfloat16()).dtype == torch.float32


def test_pit_by_hand():
    # 4 points 1 2 2 3: y = 2 has one below and two ties: (1 + ½·2)/4 = ½; y = 0: 0; y = 9: 1; y = 2.5: ¾
    samples = torch.tensor([2.0, 1, 3, 2]).expand(4, -1)
    assert pit(samples, torch.tensor([2.0, 0, 9, 2.5])).tolist() == [0.5, 0.0, 1.0, 0.75]


def test_pit_is_uniform_for_a_calibrated_critic_and_not_otherwise():
    rng = np.random.default_rng(0)
    samples = torch.from_numpy(rng.normal(size=(4000, 99)))
    calibrated = pit(samples, torch.from_numpy(rng.normal(size=4000)))
    assert scipy.stats.kstest(calibrated.numpy(), "uniform").pvalue > 0.01
    wide = pit(samples, torch.from_numpy(0.7 * rng.normal(size=4000)))
    assert scipy.stats.kstest(wide.numpy(), "uniform").pvalue < 1e-6


def test_coverage_by_hand():
    # 10 points 0 … 9 stand at 0.05, 0.15, …: the 0.1 and 0.9 quantiles are 0.5 and 8.5
    samples = torch.arange(10.0).flip(0).expand(5, -1)
    returns = torch.tensor([0.49, 0.5, 4.0, 8.5, 8.51])
    assert coverage(samples, returns).tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


def test_coverage_of_a_calibrated_critic():
    rng = np.random.default_rng(1)
    grid = torch.from_numpy(scipy.stats.norm.ppf((np.arange(200) + 0.5) / 200)).expand(20000, -1)
    returns = torch.from_numpy(rng.normal(size=20000))
    for level in (0.5, 0.8, 0.95):
        error = math.sqrt(level * (1 - level) / 20000)
        assert coverage(grid, returns, level).mean().item() == pytest.approx(level, abs=4 * error)


def test_crps_is_the_energy_form():
    rng = np.random.default_rng(2)
    samples, returns = rng.normal(size=(30, 17)), rng.normal(size=30)
    expected = np.abs(samples - returns[:, None]).mean(-1) - 0.5 * np.abs(
        samples[:, :, None] - samples[:, None, :]
    ).mean((-1, -2))
    found = crps(torch.from_numpy(samples), torch.from_numpy(returns))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_crps_of_a_normal():
    # Closed form for N(0, 1) at y: y(2Φ(y) − 1) + 2φ(y) − 1/√π
    grid = torch.from_numpy(scipy.stats.norm.ppf((np.arange(4000) + 0.5) / 4000))
    for y in (0.0, 1.3):
        exact = y * (2 * scipy.stats.norm.cdf(y) - 1) + 2 * scipy.stats.norm.pdf(y) - 1 / math.sqrt(math.pi)
        assert crps(grid, torch.tensor(y).double()).item() == pytest.approx(exact, abs=1e-4)


def test_tail_mean_by_hand():
    # 10 points, 0.25·10 + ½ = 3 points: (0+1+2)/3 and (7+8+9)/3; a fraction too small still takes one
    samples = torch.arange(10.0).flip(0)
    assert tail_mean(samples, 0.25).item() == 1.0
    assert tail_mean(samples, 0.25, "upper").item() == 8.0
    assert tail_mean(samples, 0.01, "upper").item() == 9.0


def test_spread_and_ensemble_std_by_hand():
    # 0, 0, 4, 4: mean 2, population std 2. Heads with means 1 and 3: std 1.
    assert spread(torch.tensor([0.0, 4, 0, 4])).item() == 2.0
    assert ensemble_std(torch.tensor([[0.0, 2], [1, 5]])).item() == pytest.approx(1.0)
    assert ensemble_std(torch.randn(3, 1, 4)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("metric", [coverage, pit, crps])
@pytest.mark.parametrize("where", ["samples", "returns"])
def test_nan_shows_in_its_token_only(metric, where):
    samples, returns = torch.randn(3, 8), torch.randn(3)
    (samples[1] if where == "samples" else returns)[1] = math.nan
    assert metric(samples, returns).isnan().tolist() == [False, True, False]


def test_nan_shows_in_tails_spread_and_ensemble():
    samples = torch.randn(3, 2, 8)
    samples[1, 0, 3] = math.nan
    assert tail_mean(samples[:, 0]).isnan().tolist() == [False, True, False]
    assert spread(samples[:, 0]).isnan().tolist() == [False, True, False]
    assert ensemble_std(samples).isnan().tolist() == [False, True, False]


def test_masked_sums_add_up_over_any_cut():
    values, mask = torch.randn(7, 5), torch.rand(7, 5) < 0.5
    values[mask.logical_not()] = math.nan
    total, count = sum(masked_sums(v, m) for v, m in zip(values.split(3), mask.split(3), strict=True))
    assert (total / count).item() == pytest.approx(values[mask].double().mean().item(), rel=1e-12)


def test_explained_variance_is_verls_and_does_not_depend_on_the_cut():
    torch.manual_seed(0)
    returns = torch.randn(12, 6, dtype=torch.float64) + 3
    values = returns + 0.5 * torch.randn(12, 6, dtype=torch.float64)
    mask = torch.rand(12, 6) < 0.6
    sums = sum(
        explained_variance_sums(v, r, m)
        for v, r, m in zip(values.split(5), returns.split(5), mask.split(5), strict=True)
    )
    # verl's compute_data_metrics: 1 − var(returns − values)/(var(returns) + 1e-5) over valid tokens
    y, e = returns[mask], (returns - values)[mask]
    assert explained_variance(sums).item() == pytest.approx((1 - e.var() / (y.var() + 1e-5)).item(), rel=1e-9)
    one = explained_variance_sums(torch.ones(1), torch.ones(1), torch.ones(1))
    assert explained_variance(one).isnan()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: crossing_fraction(torch.zeros(2, 0)), r"quantiles has shape \(2, 0\)"),
        (lambda: coverage(torch.zeros(2, 3), torch.zeros(3)), r"returns has shape \(3,\)"),
        (lambda: coverage(torch.zeros(2, 3), torch.zeros(2), 1.0), "level is 1.0"),
        (lambda: pit(torch.zeros(2, 0), torch.zeros(2)), r"\(2, 0\)"),
        (lambda: crps(torch.zeros(2, 3), torch.zeros(2, 1)), r"returns has shape \(2, 1\)"),
        (lambda: tail_mean(torch.zeros(2, 3), 0.6), "fraction is 0.6"),
        (lambda: tail_mean(torch.zeros(2, 3), 0.1, "left"), "side is 'left'"),
        (lambda: ensemble_std(torch.zeros(3)), r"\(3,\)"),
        (lambda: masked_sums(torch.zeros(3), torch.zeros(2)), r"mask has shape \(2,\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
