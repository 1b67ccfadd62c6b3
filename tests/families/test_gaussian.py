# SPDX-License-Identifier: Apache-2.0
"""The variance head against scipy's normal distribution, a loop over targets, and distributions that are known."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from verl_dvpo.families.gaussian import GaussianConfig, GaussianFamily
from verl_dvpo.families.registry import family_settings


def outputs_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2


def std_of(family: GaussianFamily, outputs: torch.Tensor) -> np.ndarray:
    return family.keep(outputs)[..., 1].numpy()


def test_quantiles_are_scipys():
    family, outputs = GaussianFamily(GaussianConfig()), outputs_of(7)
    levels = torch.tensor([0.05, 0.16, 0.5, 0.84, 0.95])
    expected = stats.norm.ppf(levels.double().numpy(), outputs[:, :1].numpy(), std_of(family, outputs)[:, None])
    np.testing.assert_allclose(family.quantiles(outputs, levels).numpy(), expected, rtol=1e-6)
    low, high = family.quantiles(outputs, torch.tensor([0.16, 0.84])).unbind(-1)
    np.testing.assert_allclose(0.5 * (high - low).numpy(), std_of(family, outputs), rtol=0.01)


def test_the_standard_deviation_is_that_of_the_output_between_the_bounds_and_stays_inside_them():
    family = GaussianFamily(GaussianConfig(min_std=0.01, max_std=100.0))
    log_variance = torch.tensor([-1000.0, -2.0, 0.0, 2.0, 1000.0], dtype=torch.float64, requires_grad=True)
    outputs = torch.stack([torch.zeros_like(log_variance), log_variance], -1)
    std = family.keep(outputs)[:, 1]
    np.testing.assert_allclose(std.detach()[1:4].numpy(), np.exp([-1.0, 0.0, 1.0]), rtol=1e-3)
    assert std[0].item() == pytest.approx(0.01)
    assert std[-1].item() == pytest.approx(100.0)
    inner = torch.tensor([[0.0, -15.0], [0.0, 15.0]], dtype=torch.float64, requires_grad=True)
    family.keep(inner)[:, 1].sum().backward()
    assert (inner.grad[:, 1] > 0).all()  # beyond the bounds it can still come back


def test_the_loss_is_the_likelihood_of_the_targets():
    """Mean over K targets of −log N(z; μ, σ²), without ½·log 2π; and its gradient."""
    family, outputs = GaussianFamily(GaussianConfig()), outputs_of(5, seed=1).requires_grad_()
    z = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 3
    total = family.loss(outputs, {"mean": z.mean(-1), "variance": z.var(-1, correction=0)}).total
    std = std_of(family, outputs.detach())
    for row in range(5):
        mean = outputs[row, 0].item()
        likelihood = np.mean([-stats.norm.logpdf(each, mean, std[row]) for each in z[row].numpy()])
        assert total[row].item() == pytest.approx(likelihood - 0.5 * math.log(2 * math.pi))
    total.sum().backward()
    expected = (outputs.detach()[:, 0] - z.mean(-1)).numpy() / std**2
    np.testing.assert_allclose(outputs.grad[:, 0].numpy(), expected, rtol=1e-9)


def test_monte_carlo_targets_by_hand():
    """λ = 1: every sample of a token is its return; the masked reward and the padding row have no part in it."""
    family = GaussianFamily(GaussianConfig())
    mask = torch.tensor([[1, 0, 1], [0, 0, 0]])
    rewards = torch.tensor([[1.0, 50.0, 2.0], [0.0, 0.0, 0.0]])
    built = family.build_targets(torch.rand(2, 3, 2), rewards, mask, gamma=0.5, lam=1.0)
    torch.testing.assert_close(built["mean"][0, [0, 2]], torch.tensor([2.0, 2.0]))
    assert not built["variance"].any()


def test_one_step_targets_carry_the_next_states_mean_and_variance():
    """λ = 0: the target of the first token is r + γ·N(μ', σ'²), to the bit of the moments; the last one's is r."""
    family = GaussianFamily(GaussianConfig())
    kept = torch.tensor([[[9.0, 5.0], [3.0, 2.0]]])
    built = family.build_targets(kept, torch.tensor([[0.5, 7.0]]), torch.ones(1, 2), gamma=0.5, lam=0.0)
    torch.testing.assert_close(built["mean"], torch.tensor([[0.5 + 1.5, 7.0]]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(built["variance"], torch.tensor([[1.0, 0.0]]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lam", [0.5, 1.0])
def test_it_finds_the_mean_and_the_spread_of_a_walk(lam):
    """4 fair ±1 steps with a terminal reward: from step t the return is N(x, 4 − t), nearly; whatever λ is."""
    family = GaussianFamily(GaussianConfig())
    steps, width = 4, 9
    generator = torch.Generator().manual_seed(0)
    table = torch.zeros(steps, width, 2, requires_grad=True)
    optimizer = torch.optim.Adam([table], lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, 500)
    mask = torch.ones(256, steps)
    for _ in range(500):
        jumps = torch.randint(0, 2, (256, steps), generator=generator) * 2 - 1
        places = torch.cat([torch.zeros(256, 1, dtype=torch.long), jumps.cumsum(1)], 1)
        rewards = torch.zeros(256, steps)
        rewards[:, -1] = places[:, -1].float()
        index = places[:, :-1] + 4
        outputs = table[torch.arange(steps), index]
        kept = family.keep(outputs.detach())
        built = family.build_targets(kept, rewards, mask, gamma=1.0, lam=lam, generator=generator)
        targets = {name: tensor.flatten() for name, tensor in built.items()}
        loss = family.loss(outputs.flatten(0, 1), targets).total.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    kept = family.keep(table.detach())
    for step, place in ((0, 0), (1, 1), (2, 0), (3, -1)):
        mean, std = kept[step, place + 4].tolist()
        assert mean == pytest.approx(place, abs=0.15)
        assert std == pytest.approx(math.sqrt(steps - step), rel=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_std": 0.0}, "min_std is 0.0; it must be a finite number > 0"),
        ({"max_std": 0.1}, "max_std is 0.1; it must be a finite number > 0.1"),
        ({"target": "quantile_gae"}, "target is 'quantile_gae'; it must be one of"),
        ({"num_samples": 1}, "num_samples is 1; it must be an integer >= 2"),
    ],
)
def test_settings_have_bounds(settings, message):
    with pytest.raises(ValueError, match=message):
        family_settings("gaussian", **settings)
