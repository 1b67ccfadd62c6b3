# SPDX-License-Identifier: Apache-2.0
"""The package reproduces the numbers of docs/method.md, sections 3 and 4."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from verl_dvpo.distributional import (
    TERMS,
    DVPOLossConfig,
    distributional_gae,
    dvpo_loss,
    quantile_huber_loss,
    quantile_levels,
    sample_replacement_returns,
)

STEPS, POINTS = 9, 50


def walks(copies: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Builds all 2^9 walks of 9 fair ±1 steps, ``copies`` times: states x_0 … x_8 as 0 … 16, and rewards 1{x_9 > 0}."""
    moves = torch.tensor(list(itertools.product((-1, 1), repeat=STEPS))).repeat(copies, 1)
    places = moves.cumsum(-1)
    states = torch.nn.functional.pad(places[:, :-1], (1, 0)) + STEPS - 1
    rewards = torch.zeros(moves.shape, dtype=torch.float64)
    rewards[:, -1] = (places[:, -1] > 0).double()
    return states, rewards


def fixed_point(targets_of, states: torch.Tensor, sweeps: int) -> torch.Tensor:
    """Replaces each entry of a table (t, x, M) by its pooled targets' quantiles ``sweeps`` times; gives the start."""
    table = torch.zeros(STEPS, 2 * STEPS - 1, POINTS, dtype=torch.float64)
    time = torch.arange(STEPS).expand_as(states)
    levels = quantile_levels(POINTS, dtype=torch.float64)
    for _ in range(sweeps):
        targets = targets_of(table[time, states])
        for t in range(STEPS):
            for x in states[:, t].unique():
                pooled = targets[states[:, t] == x, t].flatten()
                table[t, x] = pooled.quantile(levels)
    return table[0, STEPS - 1]


@pytest.mark.parametrize(("lam", "spread"), [(0.5, 0.343), (0.95, 0.406), (1.0, 0.500)])
def test_spread_of_eq_2_is_too_small(lam, spread):
    """All walks are used, so the difference comes from the rounding and the sampling of the documented numbers."""
    states, rewards = walks(1)
    mask = torch.ones_like(rewards)
    start = fixed_point(lambda q: distributional_gae(rewards, q, mask, gamma=1.0, lam=lam)[0], states, STEPS + 1)
    assert start.std(correction=0).item() == pytest.approx(spread, abs=0.005)
    assert start.mean().item() == pytest.approx(0.5, abs=0.005)


@pytest.mark.parametrize("lam", [0.5, 0.95, 1.0])
def test_spread_of_sample_replacement_is_right(lam):
    """The value is 0 or 1 with probability ½, so its std is 0.5; one of 50 points more at 1 moves that by 0.0002."""
    states, rewards = walks(8)
    mask, generator = torch.ones_like(rewards), torch.Generator().manual_seed(0)

    def targets(quantiles):
        return sample_replacement_returns(rewards, quantiles, mask, gamma=1.0, lam=lam, generator=generator)

    start = fixed_point(targets, states, STEPS + 1)
    assert start.std(correction=0).item() == pytest.approx(0.5, abs=0.005)
    assert start.mean().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("p", "mean"), [(0.05, 0.120), (0.9, 0.819)])
def test_huber_of_width_1_fits_expectiles(p, mean):
    """With Bernoulli(p) rewards and κ = 1 the minimum over θ is at τp/(τp + (1−τ)(1−p)), not at a quantile."""
    levels = quantile_levels(200, "right", dtype=torch.float64)
    z = (torch.arange(100) >= 100 * (1 - p) - 1e-9).double()
    theta = torch.full((200,), 0.5, dtype=torch.float64, requires_grad=True)
    for _ in range(600):  # the curvature of each θ_j is (1−τ)(1−p) + τp, from 0.05 to 0.95: gradient descent is enough
        (slope,) = torch.autograd.grad(200 * quantile_huber_loss(theta, z, levels, kappa=1.0), theta)
        theta = (theta - slope).detach().requires_grad_()
    expectiles = levels * p / (levels * p + (1 - levels) * (1 - p))
    torch.testing.assert_close(theta.detach(), expectiles, rtol=0, atol=1e-9)
    assert theta.mean().item() == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize("p", [0.05, 0.9])
def test_pinball_fits_quantiles(p):
    """With κ = 0 and midpoints each θ is an atom, 0 or 1, by the sign of the slope between them; their mean is p."""
    levels = quantile_levels(200, dtype=torch.float64)
    z = (torch.arange(100) >= 100 * (1 - p) - 1e-9).double()
    theta = torch.full((200,), 0.5, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(quantile_huber_loss(theta, z, levels, kappa=0.0), theta)
    assert (slope != 0).all()
    assert (slope < 0).double().mean().item() == pytest.approx(p, abs=1e-12)


def test_the_last_right_level_can_only_ratchet_up():
    """At τ = 1 the pinball's slope is never positive, so nothing pulls the last quantile down."""
    z = torch.zeros(30)
    for kind, pulled_down in (("right", False), ("midpoint", True)):
        theta = torch.full((10,), 5.0, requires_grad=True)
        quantile_huber_loss(theta, z, quantile_levels(10, kind), kappa=0.0).backward()
        assert (theta.grad[-1] > 0).item() is pulled_down


@pytest.mark.parametrize("kappa", [0.0, 1.0])
def test_risk_moves_no_minimiser(kappa):
    """``risk`` scales each quantile's own slope by a positive number, so both slopes vanish at the same θ."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(6, 1, 20, dtype=torch.float64, generator=generator).requires_grad_()
    z, levels = torch.randn(6, 30, dtype=torch.float64, generator=generator), quantile_levels(20, dtype=torch.float64)
    config = DVPOLossConfig(kappa=kappa, risk_temperature=0.3, coef=dict.fromkeys(TERMS, 0.0) | {"risk": 10.0})
    terms = dvpo_loss(theta, z, levels, config).terms
    plain, risk = (torch.autograd.grad(terms[name].sum(), theta)[0][:, 0] for name in ("quantile", "risk"))
    raw = [math.exp(-level / 0.3) for level in levels.tolist()]
    expected = torch.tensor([20 * w / sum(raw) for w in raw], dtype=torch.float64)
    assert expected.min() > 0
    torch.testing.assert_close(risk, plain * expected)
    assert plain.abs().max() > 0
