# SPDX-License-Identifier: Apache-2.0
"""The eight terms against hand-worked numbers and a per-token loop over docs/method.md, section 4."""

from __future__ import annotations

import itertools
import math
import pathlib
import re

import naive
import numpy as np
import pytest
import torch

from verl_dvpo.distributional import (
    CONSTRAINT_TERMS,
    MULTIPLIERS,
    TERMS,
    DVPOLossConfig,
    constraint_multipliers,
    dvpo_loss,
    quantile_levels,
)
from verl_dvpo.distributional.losses import head_consistency


def only(*names, value=1.0):
    return {name: value if name in names else 0.0 for name in TERMS}


def differences(q, z, levels, alpha, beta):
    """Computes d(q) of one token with numpy, from the table of docs/method.md, section 4."""
    q, z = np.sort(q), np.sort(z)

    def size(share, points):
        return max(1, int(share * len(points) + 0.5))

    def low(v):
        return v[: size(alpha, v)]

    def up(v):
        return v[len(v) - size(beta, v) :]

    def bend(v):
        return 0.0 if len(v) < 3 else np.mean([abs(v[i] - 2 * v[i + 1] + v[i + 2]) for i in range(len(v) - 2)])

    read = z if len(z) == len(q) else np.interp(levels, (np.arange(len(z)) + 0.5) / len(z), z)
    return {
        "cvar": low(q).mean() - low(z).mean(),
        "gain": up(z).mean() - up(q).mean(),
        "shift": z.mean() - q.mean(),
        "shape_low": low(q).var() - low(z).var(),
        "shape_up": up(z).var() - up(q).var(),
        "curvature_low": bend(low(q)) - bend(low(read)),
        "curvature_up": bend(up(read)) - bend(up(q)),
    }


def token_terms(theta, z, levels, config):
    """Computes all terms of one token in ``token`` mode by loops: theta (N, M), z (K,)."""
    q = theta.mean(0)
    d = differences(q, z, levels, config.alpha, config.beta)
    weights = np.exp(-levels / config.risk_temperature)
    weights = weights / weights.mean()
    pairs = list(itertools.combinations(range(len(theta)), 2))
    relu = {name: max(0.0, value) for name, value in d.items()}
    return {
        "quantile": np.mean([naive.loop_loss(list(t), list(z), list(levels), config.kappa)[0] for t in theta]),
        "risk": naive.loop_loss(list(q), list(z), list(levels), config.kappa, list(weights))[0],
        "cvar": d["cvar"] ** 2,
        "gain": relu["gain"] ** 2,
        "shift": relu["shift"],
        "shape": relu["shape_low"] + relu["shape_up"],
        "curvature": relu["curvature_low"] + relu["curvature_up"],
        "consistency": np.mean([np.mean((theta[i] - theta[j]) ** 2) for i, j in pairs]) if pairs else 0.0,
    }


@pytest.mark.parametrize(("n", "m", "k"), [(1, 20, 20), (3, 20, 33), (4, 33, 7), (2, 1, 5), (2, 5, 1)])
@pytest.mark.parametrize("kind", ["midpoint", "right"])
@pytest.mark.parametrize("kappa", [0.0, 0.3])
def test_every_term_per_token_equals_the_loop(n, m, k, kind, kappa):
    torch.manual_seed(n + m + k)
    theta = torch.randn(2, 3, n, m, dtype=torch.float64)
    z = 1.3 * torch.randn(2, 3, k, dtype=torch.float64)
    levels = quantile_levels(m, kind, dtype=torch.float64)
    coef = {name: 0.1 * (i + 1) for i, name in enumerate(TERMS)}
    config = DVPOLossConfig(kappa=kappa, alpha=0.2, beta=0.3, risk_temperature=0.4, constraint="token", coef=coef)
    found = dvpo_loss(theta, z, levels, config)
    assert set(found.terms) == {"quantile", *TERMS}
    for token in itertools.product(range(2), range(3)):
        expected = token_terms(theta[token].numpy(), z[token].numpy(), levels.numpy(), config)
        for name, value in expected.items():
            assert found.terms[name][token].item() == pytest.approx(value, rel=1e-9, abs=1e-13), name
        total = expected["quantile"] + sum(coef[name] * expected[name] for name in TERMS)
        assert found.total[token].item() == pytest.approx(total, rel=1e-9)


def test_batch_mode_is_twice_multiplier_times_difference():
    torch.manual_seed(0)
    theta, z = torch.randn(5, 3, 20, dtype=torch.float64), torch.randn(5, 16, dtype=torch.float64)
    levels = quantile_levels(20, dtype=torch.float64)
    config = DVPOLossConfig(alpha=0.2, beta=0.3, constraint="batch", coef=dict.fromkeys(TERMS, 0.5))
    given = {name: torch.tensor(0.1 * (i + 1), dtype=torch.float64) for i, name in enumerate(MULTIPLIERS)}
    terms = dvpo_loss(theta, z, levels, config, given).terms
    for token in range(5):
        d = differences(theta[token].mean(0).numpy(), z[token].numpy(), levels.numpy(), 0.2, 0.3)
        step = {name: 2 * given[name].item() * d[name] for name in MULTIPLIERS}
        expected = {
            "cvar": step["cvar"],
            "gain": step["gain"],
            "shift": step["shift"],
            "shape": step["shape_low"] + step["shape_up"],
            "curvature": step["curvature_low"] + step["curvature_up"],
        }
        for name, value in expected.items():
            assert terms[name][token].item() == pytest.approx(value, rel=1e-9, abs=1e-13), name


def hand_case():
    """N = 1, M = K = 10, tails of 3 points (α = β = 0.3), unsorted on purpose.

    q ascending: 0 1 3 | 4 5 6 7 | 8 9 11     low mean 4/3, up mean 28/3, mean 5.4
    z ascending: 1 2 6 | 6 6 6 6 | 7 10 16    low mean 3,   up mean 11,   mean 6.6
    variances: low q (0+1+9)/3 − 16/9 = 14/9; low z (1+4+36)/3 − 9 = 14/3
               up q (64+81+121)/3 − 784/9 = 14/9; up z (49+100+256)/3 − 121 = 14
    second differences: low q 0−2+3 = 1, low z 1−4+6 = 3, up q 8−18+11 = 1, up z 7−20+16 = 3
    """
    q = torch.tensor([3.0, 0, 1, 11, 8, 9, 4, 5, 6, 7], dtype=torch.float64)
    z = torch.tensor([6.0, 6, 6, 6, 16, 10, 7, 2, 1, 6], dtype=torch.float64)
    return q, z, quantile_levels(10, dtype=torch.float64)


HAND = {
    "cvar": 4 / 3 - 3,
    "gain": 11 - 28 / 3,
    "shift": 6.6 - 5.4,
    "shape_low": 14 / 9 - 14 / 3,  # the lower tail is narrower already: not violated
    "shape_up": 14 - 14 / 9,
    "curvature_low": 1.0 - 3.0,  # not violated
    "curvature_up": 3.0 - 1.0,
}


def test_hand_worked_constraints_per_token():
    q, z, levels = hand_case()
    config = DVPOLossConfig(alpha=0.3, beta=0.3, constraint="token", coef=only(*CONSTRAINT_TERMS))
    terms = dvpo_loss(q[None], z, levels, config).terms
    assert terms["cvar"].item() == pytest.approx((5 / 3) ** 2)
    assert terms["gain"].item() == pytest.approx((5 / 3) ** 2)
    assert terms["shift"].item() == pytest.approx(1.2)
    assert terms["shape"].item() == pytest.approx(112 / 9)
    assert terms["curvature"].item() == pytest.approx(2.0)


def test_hand_worked_multipliers():
    q, z, levels = hand_case()
    config = DVPOLossConfig(alpha=0.3, beta=0.3)
    # A second token that fits perfectly halves every mean; a masked third one, all NaN, counts for nothing.
    quantiles = torch.stack([q, z, torch.full_like(q, math.nan)])
    targets = torch.stack([z, z, torch.full_like(z, math.nan)])
    found = constraint_multipliers(quantiles, targets, torch.tensor([1, 1, 0]), levels, config)
    assert tuple(found) == MULTIPLIERS
    for name, value in HAND.items():
        expected = value / 2 if name == "cvar" else max(0.0, value / 2)
        assert found[name].item() == pytest.approx(expected, abs=1e-12), name


def test_hand_worked_curvature_of_another_size():
    # K = 2, z = 0, 8 at the midpoints ¼ and ¾; M = 4 midpoints ⅛ ⅜ ⅝ ⅞ read 0, 2, 6, 8; α = β = ½ takes two points:
    # no curvature. With M = 8 the midpoints 1/16 … 15/16 read 0 0 1 3 5 7 8 8, tails of four: 0 0 1 3 and 5 7 8 8,
    # second differences 1, 1 (mean 1) and −1, −1 (mean 1). q = 0 … 7 has none.
    config = DVPOLossConfig(alpha=0.5, beta=0.5)
    z = torch.tensor([8.0, 0.0])
    found = constraint_multipliers(torch.arange(4.0), z, torch.tensor(1), quantile_levels(4), config)
    assert found["curvature_up"].item() == 0
    found = constraint_multipliers(torch.arange(8.0), z, torch.tensor(1), quantile_levels(8), config)
    assert found["curvature_low"].item() == 0  # relu(0 − 1)
    assert found["curvature_up"].item() == pytest.approx(1.0)


def test_hand_worked_risk_and_consistency():
    # Risk: τ = ¼, ¾, temperature ½: weights e^−0.5, e^−1.5 over their mean: 2/(1 + e^−1) = 1.462117, 0.537883.
    # q = 0 (both), z = 1, κ = 0: pinballs ¼, ¾; mean (1.462117·0.25 + 0.537883·0.75)/2 = 0.384471
    # Heads (−1, −2), (1, 2): pair differences 4, 16: mean 10.
    theta = torch.tensor([[-1.0, -2.0], [1.0, 2.0]])
    config = DVPOLossConfig(kappa=0.0, risk_temperature=0.5, coef=only("risk", "consistency"))
    terms = dvpo_loss(theta, torch.tensor([1.0]), quantile_levels(2), config).terms
    assert terms["risk"].item() == pytest.approx(0.384471, abs=1e-6)
    assert terms["consistency"].item() == pytest.approx(10.0)


@pytest.mark.parametrize("mode", ["batch", "token"])
@pytest.mark.parametrize("heads", [1, 3])
def test_a_perfect_fit_costs_no_constraint(mode, heads):
    torch.manual_seed(1)
    z = torch.randn(6, 40, dtype=torch.float64)
    levels = quantile_levels(40, dtype=torch.float64)
    config = DVPOLossConfig(constraint=mode, coef=dict.fromkeys(TERMS, 1.0))
    given = constraint_multipliers(z.flip(-1), z, torch.ones(6), levels, config)
    assert all(value.abs() < 1e-12 for value in given.values())
    terms = dvpo_loss(z[:, None].expand(-1, heads, -1), z, levels, config, given).terms
    for name in (*CONSTRAINT_TERMS, "consistency"):
        assert terms[name].abs().max() < 1e-12, name


def test_batch_gradient_is_that_of_the_squared_violation():
    """The gradient of 2·μ·d, summed over the update's n tokens, is n times that of b² or relu(b)²."""
    torch.manual_seed(2)
    theta = torch.randn(7, 2, 20, dtype=torch.float64, requires_grad=True)
    z = 1.5 * torch.randn(7, 20, dtype=torch.float64) + 0.3
    levels = quantile_levels(20, dtype=torch.float64)
    for term in ("cvar", "gain", "shift"):
        config = DVPOLossConfig(alpha=0.2, beta=0.2, coef=only(term))
        given = constraint_multipliers(theta.mean(1), z, torch.ones(7), levels, config)
        (found,) = torch.autograd.grad(dvpo_loss(theta, z, levels, config, given).terms[term].sum(), theta)
        q, zs = theta.mean(1).sort(-1).values, z.sort(-1).values
        d = {
            "cvar": q[:, :4].mean(-1) - zs[:, :4].mean(-1),
            "gain": zs[:, -4:].mean(-1) - q[:, -4:].mean(-1),
            "shift": zs.mean(-1) - q.mean(-1),
        }[term]
        b = d.mean()
        (expected,) = torch.autograd.grad(7 * (b if term == "cvar" else b.relu()) ** 2, theta)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        assert found.abs().max() > 0


def test_consistency_keeps_only_its_inputs_for_the_backward_pass():
    """The consistency term saves only its inputs, because θ is the largest tensor of the loss."""
    theta = torch.randn(6, 3, 50, requires_grad=True)
    config = DVPOLossConfig(coef=only("consistency"))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        head_consistency(theta, theta.mean(-2))
    assert {t.data_ptr() for t in kept if t.numel() == theta.numel()} == {theta.data_ptr()}
    # And its gradient is that of the pairs: 2·(θ_i − θ_i') each, over 3 pairs and 50 levels.
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = sum((theta[:, i] - theta[:, j]).square().mean(-1) for i, j in pairs) / 3
    found = dvpo_loss(theta, torch.zeros(6, 4), quantile_levels(50), config).terms["consistency"]
    torch.testing.assert_close(found, expected)
    weight = torch.arange(1.0, 7.0)
    gradients = [torch.autograd.grad((value * weight).sum(), theta)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kappa", [0.0, 1.0])
def test_extra_memory_is_a_few_inputs(kappa):
    """All eight terms, forward and backward, hold at most 8 tensors of θ's size beyond the inputs."""
    torch.manual_seed(7)
    theta, z = torch.randn(27_000, 3, 200, requires_grad=True), torch.randn(27_000, 200)
    levels, config = quantile_levels(200), DVPOLossConfig(kappa=kappa, coef=dict.fromkeys(TERMS, 0.1))
    given = constraint_multipliers(theta.detach().mean(1), z, torch.ones(27_000), levels, config)
    status, reset = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")

    def resident(field: str) -> int:
        return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status.read_text())[1])

    reset.write_text("5")  # the peak starts again from now
    before = resident("VmRSS")
    dvpo_loss(theta, z, levels, config, given).total.sum().backward()
    assert (resident("VmHWM") - before) / (theta.numel() * 4) <= 8


@pytest.mark.parametrize("mode", ["batch", "token"])
def test_gradient_of_the_total_is_right(mode):
    torch.manual_seed(3)
    theta = torch.randn(3, 3, 12, dtype=torch.float64, requires_grad=True)
    z = 1.5 * torch.randn(3, 9, dtype=torch.float64)
    levels = quantile_levels(12, dtype=torch.float64)
    config = DVPOLossConfig(kappa=0.2, alpha=0.3, beta=0.3, constraint=mode, coef=dict.fromkeys(TERMS, 0.7))
    given = {name: torch.tensor(0.3 + 0.1 * i) for i, name in enumerate(MULTIPLIERS)}
    assert torch.autograd.gradcheck(lambda t: dvpo_loss(t, z, levels, config, given).total, theta, eps=1e-7, atol=1e-6)


def test_coefficient_zero_skips_the_work(monkeypatch):
    """Without constraints there is no sort of q and no need of multipliers; without risk there is one pinball sum."""
    calls = []
    real = dvpo_loss.__globals__["sorted_quantile_huber"]
    monkeypatch.setitem(
        dvpo_loss.__globals__, "sorted_quantile_huber", lambda *a, **k: calls.append("pinballs") or real(*a, **k)
    )
    monkeypatch.setattr(
        "verl_dvpo.distributional.constraints.sort_with_gradient", lambda q: calls.append("sort") or q.sort(-1).values
    )
    theta, z, levels = torch.randn(2, 3, 10), torch.randn(2, 10), quantile_levels(10)
    found = dvpo_loss(theta, z, levels, DVPOLossConfig(coef=only()))
    assert set(found.terms) == {"quantile"}
    assert torch.equal(found.total, found.terms["quantile"])
    assert calls == ["pinballs"]
    dvpo_loss(theta, z, levels, DVPOLossConfig(constraint="token", coef=only("risk", "shift")))
    assert calls == ["pinballs", "pinballs", "pinballs", "sort"]


def test_shipped_defaults_are_those_of_the_method_and_of_the_critic_lab():
    config = DVPOLossConfig()
    assert (config.kappa, config.alpha, config.beta) == (1.0, 0.1, 0.1)
    assert (config.constraint, config.constraint_statistics) == ("batch", "value")
    assert config.coef == {
        "risk": 0.1, "cvar": 0.0005, "gain": 0.02, "shift": 0.005, "shape": 0.02, "curvature": 0.0, "consistency": 0.1
    }  # fmt: skip
    assert DVPOLossConfig(coef={"risk": 0.0}).coef == {**config.coef, "risk": 0.0}
