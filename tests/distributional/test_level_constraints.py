# SPDX-License-Identifier: Apache-2.0
"""``constraint_statistics: level``: multipliers against hand-worked numbers and loops, and what may not go with it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from verl_dvpo.distributional import (
    TERMS,
    DVPOLossConfig,
    constraint_multipliers,
    dvpo_loss,
    quantile_levels,
)
from verl_dvpo.distributional.config import check_level_statistics
from verl_dvpo.distributional.constraints import constraint_differences, level_differences


def level_config(**fields) -> DVPOLossConfig:
    return DVPOLossConfig(constraint_statistics="level", **fields)


def only(*names, value=1.0):
    return {name: value if name in names else 0.0 for name in TERMS}


def naive(q, z, mask, levels, alpha, beta):
    """Computes μ by three loops in float64."""
    sums, tokens = {"cvar": 0.0, "gain": 0.0, "shift": 0.0}, 0
    for q_row, z_row, valid in zip(q.tolist(), z.tolist(), mask.tolist(), strict=True):
        if not valid:
            continue
        tokens += 1
        excess = []
        for q_j, tau in zip(sorted(q_row), levels.tolist(), strict=True):
            share = 0.0
            for z_k in z_row:
                share += 1.0 if z_k < q_j else 0.5 if z_k == q_j else 0.0
            excess.append(share / len(z_row) - tau)
        low, up = (max(1, int(part * len(excess) + 0.5)) for part in (alpha, beta))
        sums["cvar"] += np.mean(excess[:low])
        sums["gain"] -= np.mean(excess[len(excess) - up :])
        sums["shift"] -= np.mean(excess)
    return {name: value / tokens for name, value in sums.items()}


@pytest.mark.parametrize(("m", "k"), [(1, 1), (1, 7), (10, 1), (20, 20), (33, 64), (50, 9), (200, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ties", [False, True])
def test_multipliers_equal_the_loops(m, k, dtype, ties):
    generator = torch.Generator().manual_seed(m + k)
    q = torch.randn(6, m, generator=generator, dtype=dtype)
    z = 1.5 * torch.randn(6, k, generator=generator, dtype=dtype) + 0.2
    if ties:
        q, z = (2 * q).round(), (2 * z).round()
    mask = torch.tensor([1, 0, 1, 1, 1, 0])
    levels = quantile_levels(m, dtype=torch.float64)
    found = constraint_multipliers(q, z, mask, levels, level_config(alpha=0.2, beta=0.35))
    expected = naive(q, z, mask, levels, 0.2, 0.35)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == torch.float64
        assert found[name].item() == pytest.approx(value, rel=1e-6, abs=1e-6 if dtype == torch.float32 else 1e-12), name


def test_hand_worked_multipliers():
    # q = 1 … 10 at 0.05 … 0.95, tails of 2 points, unsorted; z has 1 of 4 below q_1, ties with q_2 and q_9, 1 between.
    q = torch.tensor([3.0, 1, 2, 10, 9, 8, 4, 5, 6, 7])
    z = torch.tensor([9.0, 0.0, 5.5, 2.0])
    cdf = [0.25, 0.375, 0.5, 0.5, 0.5, 0.75, 0.75, 0.75, 0.875, 1.0]
    one = {
        "cvar": (0.25 - 0.05 + 0.375 - 0.15) / 2,
        "gain": (0.85 - 0.875 + 0.95 - 1.0) / 2,
        "shift": 0.5 - sum(cdf) / 10,
    }
    # A second token with every target above q: F_z = 0. A third, masked one counts for nothing, NaN or not.
    other = {"cvar": -0.1, "gain": 0.9, "shift": 0.5}
    quantiles = torch.stack([q, q, torch.full_like(q, math.nan)])
    targets = torch.stack([z, torch.full_like(z, 99.0), torch.full_like(z, math.inf)])
    config = level_config(alpha=0.2, beta=0.2)
    found = constraint_multipliers(quantiles, targets, torch.tensor([1, 1, 0]), quantile_levels(10), config)
    for name, value in one.items():
        assert found[name].item() == pytest.approx((value + other[name]) / 2, abs=1e-6), name
    # Two-sided: one-sided multipliers would be 0 here.
    below = constraint_multipliers(q[None], torch.full((1, 4), -9.0), torch.ones(1), quantile_levels(10), config)
    assert below["gain"].item() == pytest.approx(-0.1)
    assert below["shift"].item() == pytest.approx(-0.5)


def test_terms_move_tails_and_mean_by_hand():
    """The gradient of cvar is 2·b/k on the k lowest of q, of gain −2·b/k on the k highest, of shift −2·b/M on all."""
    q = torch.tensor([[[5.0, 1, 4, 2, 3]]], requires_grad=True)  # N = 1
    z = torch.tensor([[0.0, 1, 2, 2]])
    given = {name: torch.tensor(value) for name, value in (("cvar", 0.3), ("gain", -0.2), ("shift", 0.1))}
    config = level_config(alpha=0.4, beta=0.4, coef=only("cvar", "gain", "shift"))
    terms = dvpo_loss(q, z, quantile_levels(5), config, given).terms
    # 2·b·d(q): low means 1.5 and (0 + 1)/2; up means 4.5 and 2; means 3 and 1.25.
    assert terms["cvar"].item() == pytest.approx(2 * 0.3 * (1.5 - 0.5))
    assert terms["gain"].item() == pytest.approx(2 * -0.2 * (2.0 - 4.5))
    assert terms["shift"].item() == pytest.approx(2 * 0.1 * (1.25 - 3.0))
    expected = {
        "cvar": [0, 0.3, 0, 0.3, 0],
        "gain": [0.2, 0, 0.2, 0, 0],
        "shift": [-0.04] * 5,
    }
    for name, gradient in expected.items():
        (found,) = torch.autograd.grad(terms[name].sum(), q, retain_graph=True)
        assert found.flatten().tolist() == pytest.approx(gradient), name


def test_a_perfect_fit_costs_nothing():
    z = torch.randn(6, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    levels, config = quantile_levels(40, dtype=torch.float64), level_config(coef=only("cvar", "gain", "shift"))
    given = constraint_multipliers(z.flip(-1), z, torch.ones(6), levels, config)
    # F_z of the j-th of its own values is (2j − 1)/(2M): the midpoint itself.
    assert all(value.abs() < 1e-12 for value in given.values())
    terms = dvpo_loss(z[:, None].expand(-1, 3, -1), z, levels, config, given).terms
    assert all(terms[name].abs().max() < 1e-12 for name in ("cvar", "gain", "shift"))


def test_no_outlier_counts_for_more_than_one_sample():
    generator = torch.Generator().manual_seed(2)
    q, z = torch.randn(50, 20, generator=generator), torch.randn(50, 20, generator=generator).sort(-1).values
    far = z.clone()
    far[:, -1] = 1e30
    far[:, 0] = -1e30
    levels, mask = quantile_levels(20), torch.ones(50)
    near, moved = (constraint_multipliers(q, v, mask, levels, level_config()) for v in (z, far))
    for name, value in near.items():
        # Two of 20 samples moved, each past at most every q_j of a tail.
        assert abs(moved[name].item() - value.item()) <= 2 / 20
        assert moved[name].abs() <= 1
    by_value = constraint_multipliers(q, far, mask, levels, DVPOLossConfig())
    assert by_value["cvar"] > 1e28


def test_levels_vanish_at_the_mixture_and_values_do_not():
    """q holds the quantiles of N(0, 1); each token's z comes from one trajectory, N(c, 0.6²) with c ~ N(0, 0.8²)."""
    generator = torch.Generator().manual_seed(0)
    levels = quantile_levels(200, dtype=torch.float64)
    q = torch.special.ndtri(levels).expand(20_000, -1)
    centre = torch.randn(20_000, 1, generator=generator, dtype=torch.float64)
    z = 0.8 * centre + 0.6 * torch.randn(20_000, 50, generator=generator, dtype=torch.float64)
    z = z.sort(-1).values
    for name, d in level_differences(q, z, levels, level_config()).items():
        assert d.mean().item() == pytest.approx(0.0, abs=4 * float(d.std()) / 20_000**0.5 + 1e-4), name
    # A token's z has a tail mean of about −1.02, 0.6 times that of N(0, 1) but for its 50 samples; q's is −1.755.
    plain = constraint_differences(q, z, levels, DVPOLossConfig(), ("cvar", "gain"))
    assert plain["cvar"].mean().item() == pytest.approx(-0.70, abs=0.05)
    assert plain["gain"].mean().item() == pytest.approx(-0.70, abs=0.05)


def test_multipliers_depend_neither_on_sharding_nor_on_chunks(monkeypatch):
    generator = torch.Generator().manual_seed(4)
    q, z = torch.randn(10, 8, generator=generator), torch.randn(10, 12, generator=generator) - 0.4
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 0, 0, 1, 1])
    levels, config = quantile_levels(8), level_config(alpha=0.4, beta=0.4)
    whole = constraint_multipliers(q, z, mask, levels, config)
    assert whole["shift"] < 0  # a relu before or after the reduction would show
    shards, sent = [slice(0, 3), slice(3, 4), slice(4, 10)], []
    for shard in shards:
        constraint_multipliers(q[shard], z[shard], mask[shard], levels, config, reduce=lambda s: sent.append(s) or s)
    total = sum(sent)
    for shard in shards:
        found = constraint_multipliers(q[shard], z[shard], mask[shard], levels, config, reduce=lambda s: total)
        assert {name: v.item() for name, v in found.items()} == pytest.approx({n: v.item() for n, v in whole.items()})
    monkeypatch.setattr("verl_dvpo.distributional.constraints._CHUNK_CPU", 36)  # three rows
    cut = constraint_multipliers(q, z, mask, levels, config)
    assert {name: v.item() for name, v in cut.items()} == pytest.approx({n: v.item() for n, v in whole.items()})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["quantiles", "targets"])
def test_what_is_not_finite_shows(value, where):
    generator = torch.Generator().manual_seed(5)
    q, z = torch.randn(3, 10, generator=generator), torch.randn(3, 10, generator=generator)
    (q if where == "quantiles" else z)[1, 4] = value
    found = constraint_multipliers(q, z, torch.ones(3), quantile_levels(10), level_config())
    assert all(v.isnan() for v in found.values())
    found = constraint_multipliers(q, z, torch.tensor([1, 0, 1]), quantile_levels(10), level_config())
    assert all(v.isfinite() for v in found.values())


def test_other_dtypes_and_no_token():
    generator = torch.Generator().manual_seed(6)
    q, z = torch.randn(4, 10, generator=generator).bfloat16(), torch.randn(4, 12, generator=generator)
    levels, config = quantile_levels(10), level_config()
    found = constraint_multipliers(q, z.double(), torch.ones(4), levels, config)
    expected = naive(q.float(), z, torch.ones(4), levels.double(), 0.1, 0.1)
    assert {name: v.item() for name, v in found.items()} == pytest.approx(expected, abs=1e-6)
    # A target between a quantile and its float32 neighbour is above it: float64 targets are not rounded first.
    close = constraint_multipliers(
        torch.ones(1, 1), torch.full((1, 1), 1 + 1e-12, dtype=torch.float64), torch.ones(1), quantile_levels(1), config
    )
    assert close["shift"].item() == pytest.approx(0.5)
    for tokens in (0, 3):
        q, z, mask = torch.zeros(tokens, 10), torch.zeros(tokens, 9), torch.zeros(tokens)
        empty = constraint_multipliers(q, z, mask, levels, config)
        assert [value.item() for value in empty.values()] == [0.0, 0.0, 0.0]


def test_defaults_of_levels_are_those_of_the_critic_lab():
    assert level_config().coef == {
        "risk": 0.1, "cvar": 0.02, "gain": 0.02, "shift": 0.02, "shape": 0.0, "curvature": 0.0, "consistency": 0.1
    }  # fmt: skip
    assert level_config(coef={"gain": 0.5}).coef == {**level_config().coef, "gain": 0.5}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"constraint_statistics": "rank"}, "constraint_statistics is 'rank'.*value, level"),
        ({"constraint_statistics": "level", "constraint": "token"}, "'level', but constraint is 'token'.*'batch'"),
        ({"constraint_statistics": "level", "coef": {"shape": 0.1}}, "'level', but coef.shape is 0.1.*coef.shape to 0"),
        ({"constraint_statistics": "level", "coef": {"curvature": 0.3}}, "coef.curvature is 0.3.*coef.curvature to 0"),
    ],
)
def test_what_does_not_go_together_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        DVPOLossConfig(**fields)


def test_right_levels_are_refused():
    message = "constraint_statistics is 'level', but levels is 'right'.*'midpoint'.*'value'"
    with pytest.raises(ValueError, match=message):
        check_level_statistics(1.0, level_config())
    with pytest.raises(ValueError, match=message):
        constraint_multipliers(
            torch.zeros(2, 4), torch.zeros(2, 4), torch.ones(2), quantile_levels(4, "right"), level_config()
        )
    check_level_statistics(float(quantile_levels(4, "midpoint")[-1]), level_config())
    check_level_statistics(1.0, DVPOLossConfig())
