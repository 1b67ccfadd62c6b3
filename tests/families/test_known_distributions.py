# SPDX-License-Identifier: Apache-2.0
"""The flow learns known distributions, beside 200 quantiles, and couplings differ in what they keep of the spread.

A state is one row of a table of outputs, an episode is one token, and its reward is drawn from the state's
distribution. Every update goes the way the worker goes: keep, build_targets, multipliers, loss.
"""

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.stats import wasserstein_distance

from verl_dvpo.distributional.config import TERMS
from verl_dvpo.families.flow_field import euler_samples
from verl_dvpo.families.quantile_ensemble import QuantileEnsembleConfig, QuantileEnsembleFamily
from verl_dvpo.families.scalar import ScalarConfig, ScalarFamily
from verl_dvpo.families.value_flow import FLOW_TERMS, ValueFlowConfig, ValueFlowFamily

# Quantile functions, for rewards of the size of the demo's. Jumps are at levels that 32, 64 and 200 points can all hit.
TRUTH = {
    "two points": lambda u: (u > 0.75).astype(float),
    "skewed": lambda u: -0.3 * np.log1p(-u),
    "heavy tails": lambda u: 0.5 + 0.2 * stats.t.ppf(u, 3),
    "two modes": lambda u: np.where(
        u < 0.375, 0.1 + 0.08 * stats.norm.ppf(u / 0.375), 0.9 + 0.08 * stats.norm.ppf((u - 0.375) / 0.625)
    ),
}
FINE = (np.arange(20_000) + 0.5) / 20_000
STEPS, TOKENS, LR = 1000, 32, 0.01


def rewards(draws: np.ndarray) -> torch.Tensor:
    """(states, n) uniform numbers -> (states, n) rewards, a state for each distribution."""
    return torch.tensor(np.stack([quantile(u) for quantile, u in zip(TRUTH.values(), draws, strict=True)])).float()


def train(family, targets_of=None, *, seed: int = 0) -> torch.Tensor:
    """Adam on a table (states, D), all states at once. `targets_of(r)` stands in for build_targets in two tests."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    weight, bias = torch.zeros(family.num_outputs, 1), torch.zeros(family.num_outputs)
    family.init_head(weight, bias, generator)
    table = bias.expand(len(TRUTH), -1).clone().requires_grad_()
    optimizer = torch.optim.Adam([table], lr=LR)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, STEPS)
    mask = torch.ones(len(TRUTH) * TOKENS, 1)
    for _ in range(STEPS):
        outputs = table.repeat_interleave(TOKENS, 0)
        if targets_of is None:
            drawn = rewards(rng.random((len(TRUTH), TOKENS))).reshape(-1, 1)
            kept = family.keep(outputs.detach())[:, None]
            built = family.build_targets(kept, drawn, mask, gamma=1.0, lam=0.95, generator=generator)
            targets = {name: tensor.squeeze(1) for name, tensor in built.items()}
        else:
            targets = targets_of(rng, generator)
        loss = family.loss(outputs, targets, family.multipliers(targets, mask.squeeze(1)))
        optimizer.zero_grad()
        loss.total.mean().backward()
        optimizer.step()
        schedule.step()
    return table.detach()


def distances(samples: torch.Tensor) -> dict[str, float]:
    """Wasserstein-1 distance of each state's samples from its truth."""
    truths = zip(TRUTH, samples.numpy(), strict=True)
    return {name: wasserstein_distance(points, TRUTH[name](FINE)) for name, points in truths}


def true_spreads() -> torch.Tensor:
    return torch.tensor([TRUTH[name](FINE).std() for name in TRUTH])


NO_CONSTRAINTS = {"cvar": 0.0, "gain": 0.0, "shift": 0.0, "shape": 0.0}


@pytest.fixture(scope="module")
def flow() -> tuple[ValueFlowFamily, torch.Tensor]:
    """64 samples: a third of what 200 quantiles keep. Neither has constraints, which bend the tails of both."""
    family = ValueFlowFamily(ValueFlowConfig(coef=NO_CONSTRAINTS))
    return family, train(family)


def test_the_flow_is_nearly_as_close_to_the_truth_as_200_quantiles(flow):
    family, table = flow
    quantiles = QuantileEnsembleFamily(
        QuantileEnsembleConfig(
            levels="midpoint", kappa=0.0, coef=dict.fromkeys(TERMS, 0.0), target="sample_replacement"
        )
    )
    assert family.num_kept <= quantiles.num_kept / 3
    mine, theirs = distances(family.samples(table)), distances(quantiles.samples(train(quantiles)))
    for name in TRUTH:
        assert mine[name] <= 1.5 * theirs[name], (name, mine, theirs)


def test_32_samples_are_as_close_as_32_points_can_be():
    """The true quantiles at 32 midpoints are 0.026 from the heavy tails: 32 samples lose that, whoever learns them."""
    family = ValueFlowFamily(ValueFlowConfig(num_noises=32, num_frequencies=32, coef=NO_CONSTRAINTS))
    mine = distances(family.samples(train(family)))
    best = distances(rewards(np.tile((np.arange(32) + 0.5) / 32, (len(TRUTH), 1))))
    for name in TRUTH:
        assert mine[name] <= best[name] + 0.012, (name, mine, best)


def test_one_step_goes_where_32_go(flow):
    family, table = flow
    sizes = (family.config.num_frequencies, family.config.num_powers)
    one, many = (
        euler_samples(table.unflatten(-1, sizes), family.noises, family.basis, family.config.value_scale, steps)
        for steps in (1, 32)
    )
    assert not torch.equal(one, many)
    gaps = (one.sort(-1).values - many.sort(-1).values).abs().mean(-1) / one.std(-1, correction=0)
    assert (gaps < 0.05).all(), dict(zip(TRUTH, gaps.tolist(), strict=True))


@pytest.mark.parametrize("coupling", ["monotone", "independent"])
def test_independent_coupling_collapses_and_monotone_coupling_does_not(coupling):
    """Each token's targets are K fresh draws; sorted, or in any order. Independent: v(ε,0) = E[Z] − ε (method)."""
    family = ValueFlowFamily(
        ValueFlowConfig(
            num_noises=32, num_frequencies=32, coupling="sorted", coef=dict.fromkeys(FLOW_TERMS, 0.0) | {"anchor": 1.0}
        )
    )

    def targets_of(rng: np.random.Generator, generator: torch.Generator) -> dict[str, torch.Tensor]:
        drawn = rewards(rng.random((len(TRUTH), TOKENS * 32))).reshape(-1, 32)
        if coupling == "monotone":
            drawn = drawn.sort(-1).values
        return {"targets": drawn, "time": torch.rand(drawn.shape[0], generator=generator)}

    spread = family.samples(train(family, targets_of)).std(-1, correction=0)
    if coupling == "monotone":
        assert (spread > 0.8 * true_spreads()).all(), spread
    else:
        assert (spread < 0.5 * true_spreads()).all(), spread


def test_sorted_targets_of_one_trajectory_are_independent_coupling(flow):
    """Why ``calibrated`` exists: an episode's reward is one number, so all K of a token's targets are the same."""
    family = ValueFlowFamily(
        ValueFlowConfig(
            num_noises=32, num_frequencies=32, coupling="sorted", coef=dict.fromkeys(FLOW_TERMS, 0.0) | {"anchor": 1.0}
        )
    )
    collapsed = family.samples(train(family)).std(-1, correction=0)
    calibrated = flow[0].samples(flow[1]).std(-1, correction=0)
    assert (collapsed < 0.65 * true_spreads()).all(), collapsed
    assert (calibrated > 0.8 * true_spreads()).all(), calibrated


def test_one_quantile_and_a_wide_huber_zone_is_scaled_scalar_regression():
    """ρ_½^κ(u) = ½·½u²/κ for |u| ≤ κ: the scalar critic's ½u², divided by 2κ. Whatever the targets are built from."""
    kappa = 50.0
    dvpo = QuantileEnsembleFamily(
        QuantileEnsembleConfig(
            num_heads=1, num_quantiles=1, levels="midpoint", kappa=kappa, coef=dict.fromkeys(TERMS, 0.0)
        )
    )
    scalar = ScalarFamily(ScalarConfig(cliprange=1e9))
    g = torch.Generator().manual_seed(0)
    old, drawn = torch.randn(4, 9, 1, generator=g), torch.randn(4, 9, generator=g)
    mask = (torch.rand(4, 9, generator=g) < 0.7).float()
    gradients, totals = [], []
    for family in (dvpo, scalar):
        built = family.build_targets(family.keep(old), drawn, mask, gamma=0.9, lam=0.8)
        outputs = (old + 0.5).flatten(0, 1).requires_grad_()
        total = family.loss(outputs, {name: tensor.flatten(0, 1) for name, tensor in built.items()}).total
        gradients.append(torch.autograd.grad(total.sum(), outputs)[0])
        totals.append(total.detach())
    torch.testing.assert_close(totals[0] * 2 * kappa, totals[1])
    torch.testing.assert_close(gradients[0] * 2 * kappa, gradients[1])
