# SPDX-License-Identifier: Apache-2.0
"""The histogram critic: bin masses against scipy, gradients against a float64 loop, distributions that are known."""

import math
import re

import numpy as np
import pytest
import torch
from critic import harness
from hypothesis import given, settings, strategies
from hypothesis.extra import numpy as arrays
from scipy.stats import norm
from verl.trainer.ppo.core_algos import compute_gae_advantage_return

from verl_dvpo.bench.lab.process import bernoulli_walk
from verl_dvpo.critic.config import family_config
from verl_dvpo.families.base import SampledFamily
from verl_dvpo.families.hl_gauss import (
    HLGaussConfig,
    HLGaussFamily,
    histogram_quantiles,
    histogram_samples,
    returns_variance,
    smoothed_histogram,
)

MASK = torch.tensor([[1, 1, 0, 0, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]])
GAMMA, LAM = 0.9, 0.8
EDGES = torch.linspace(-0.2, 1.2, 52)
WIDTH = 1.4 / 51
SIGMA = 0.75 * WIDTH


def family(**changes) -> HLGaussFamily:
    return HLGaussFamily(HLGaussConfig(**changes))


def masses(y: float, edges: list[float], sigma: float) -> np.ndarray:
    """The bins' shares of N(y, sigma²), cut to the support: scipy, float64."""
    inside = norm.cdf(edges, loc=y, scale=sigma)
    return np.diff(inside) / (inside[-1] - inside[0])


# ---------------------------------------------------------------------- the projection


def test_bin_masses_by_hand():
    # Bins [0, 1], [1, 2], [2, 3], σ = 1, y = 1.5: Φ(−1.5) = 0.066807, Φ(−0.5) = 0.308538, Φ(0.5) = 0.691462,
    # Φ(1.5) = 0.933193. Shares (0.241730, 0.382925, 0.241730) of 0.866386.
    found = smoothed_histogram(torch.tensor([1.5]), torch.tensor([0.0, 1.0, 2.0, 3.0]), 1.0)
    assert found.tolist() == pytest.approx([0.279010, 0.441980, 0.279010], abs=1e-5)


@settings(max_examples=50, deadline=None)
@given(arrays.arrays(np.float64, (3, 4), elements=strategies.floats(-0.2, 1.2)))
def test_bin_masses_are_scipys(points):
    found = smoothed_histogram(torch.tensor(points).float(), EDGES, SIGMA)
    for row, several in zip(found, points, strict=True):
        expected = np.mean([masses(y, EDGES.tolist(), SIGMA) for y in several], axis=0)
        assert row.tolist() == pytest.approx(expected, abs=1e-5)
        assert row.sum().item() == pytest.approx(1.0, abs=1e-5)


def test_the_mean_of_a_smoothed_target_is_the_target_away_from_the_ends():
    critic = family()
    for y in (0.0, 0.013, 0.5, 1.0):
        histogram = smoothed_histogram(torch.tensor([y]), critic.edges, critic.sigma)
        assert critic.value(histogram.log()).item() == pytest.approx(y, abs=1e-4)
    # At an end half of the density is cut off: the mean of a half normal is σ·√(2/π) further in, binned a little more.
    end = smoothed_histogram(torch.tensor([1.2]), critic.edges, critic.sigma)
    assert critic.value(end.log()).item() == pytest.approx(1.2 - SIGMA * math.sqrt(2 / math.pi), abs=0.15 * SIGMA)


def test_a_target_outside_the_support_is_clipped_and_counted():
    critic = family()
    kept = torch.zeros(1, 3, 1)
    rewards = torch.tensor([[0.0, 0.0, 7.0]])
    built = critic.build_targets(kept, rewards, torch.ones(1, 3), gamma=0.1, lam=1.0)
    # Returns 0.07, 0.7 and 7: the last is clipped to 1.2.
    assert built["outside"].tolist() == [[0.0, 0.0, 1.0]]
    expected = [masses(y, EDGES.tolist(), SIGMA) for y in (0.07, 0.7, 1.2)]
    torch.testing.assert_close(built["histogram"][0].double(), torch.tensor(np.stack(expected)), rtol=0, atol=1e-5)
    assert critic.target_statistics({"outside": built["outside"].flatten()}).keys() == {"hl_gauss/out_of_support"}


def test_not_a_number_stays_visible():
    assert torch.isnan(smoothed_histogram(torch.tensor([torch.nan]), EDGES, SIGMA)).all()
    probs = torch.full((2, 51), 1 / 51)
    probs[0, 3] = torch.nan
    read = histogram_quantiles(probs, torch.tensor([0.1, 0.9]), EDGES, SIGMA)
    assert torch.isnan(read).tolist() == [[True, True], [False, False]]


# ---------------------------------------------------------------------- reading the histogram


def test_quantiles_are_those_of_the_piecewise_uniform_density_shrunk_to_the_returns_spread():
    critic = family(num_bins=9, value_min=-1.0, value_max=2.0)
    outputs = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    levels = torch.tensor([0.001, 0.2, 0.5, 0.77, 0.999])
    found = critic.quantiles(outputs, levels)
    edges, width = np.linspace(-1.0, 2.0, 10), 1 / 3
    fine = (np.arange(200_000) + 0.5) / 200_000
    for row, probs in zip(found.tolist(), outputs.double().softmax(-1).numpy(), strict=True):
        cumulated = np.concatenate([[0.0], probs.cumsum()])
        density = np.interp(fine, cumulated, edges)
        wanted = density.var() - width**2 / 6 - (0.75 * width) ** 2
        factor = math.sqrt(max(wanted, 0.0) / density.var())
        raw = np.interp(levels.double().numpy(), cumulated, edges)
        assert row == pytest.approx(density.mean() + factor * (raw - density.mean()), abs=1e-4)


@pytest.mark.parametrize(
    "points", [[0.0, 1.0], [0.1, 0.15, 0.2, 0.4, 0.8], list(norm.ppf((np.arange(200) + 0.5) / 200, 0.5, 0.1))]
)
def test_a_fitted_histogram_has_the_spread_and_the_quantiles_of_what_it_was_fitted_to(points):
    fitted = smoothed_histogram(torch.tensor(points).float(), EDGES, SIGMA)
    assert returns_variance(fitted, EDGES, SIGMA).sqrt().item() == pytest.approx(np.std(points), rel=0.02)
    levels = torch.tensor([0.1, 0.3, 0.7, 0.9])
    read = histogram_quantiles(fitted, levels, EDGES, SIGMA)
    # A bin is as wide as a quantile can be told apart, and a smoothed atom lies a σ to either side.
    expected = np.quantile(points, levels.numpy(), method="inverted_cdf")
    assert read.tolist() == pytest.approx(expected.tolist(), abs=2 * WIDTH)


def test_projecting_and_drawing_again_and_again_keeps_the_spread():
    """One-step targets do this along a sequence; without the correction 200 tokens would widen 0.1 to 0.3."""
    levels = (torch.arange(64) + 0.5) / 64
    samples = torch.tensor(norm.ppf(levels.numpy(), 0.5, 0.1)).float()
    spread = samples.std(correction=0).item()
    for _ in range(200):
        samples = histogram_samples(smoothed_histogram(samples, EDGES, SIGMA), levels, EDGES, SIGMA)
    assert samples.std(correction=0).item() == pytest.approx(spread, rel=0.01)
    assert samples.mean().item() == pytest.approx(0.5, abs=1e-3)


# ---------------------------------------------------------------------- targets and loss


def test_lambda_returns_are_verls_on_ragged_masks():
    critic = family()
    g = torch.Generator().manual_seed(1)
    outputs = torch.randn(3, 5, 51, generator=g)
    rewards = 0.3 * torch.rand(3, 5, generator=g)
    kept = critic.keep(outputs)
    assert kept.shape == (3, 5, 1)
    built = critic.build_targets(kept, rewards, MASK, gamma=GAMMA, lam=LAM)
    _, returns = compute_gae_advantage_return(rewards, critic.values_from_kept(kept), MASK.float(), GAMMA, LAM)
    for place in MASK.nonzero().tolist():
        y = returns[tuple(place)].item()
        assert -0.2 < y < 1.2
        expected = masses(y, EDGES.tolist(), SIGMA)
        assert built["histogram"][tuple(place)].tolist() == pytest.approx(expected, abs=1e-4)


def test_sample_replacement_draws_from_the_next_states_histogram():
    """λ = 0: a token's histogram is the next valid state's, shifted by the reward and discounted; by hand."""
    critic = family(target="sample_replacement", num_samples=64)
    outputs = 3.0 * torch.randn(3, 5, 51, generator=torch.Generator().manual_seed(2))
    kept = critic.keep(outputs)
    assert kept.shape == (3, 5, critic.num_kept)
    torch.testing.assert_close(critic.values_from_kept(kept), critic.value(outputs))
    rewards = torch.zeros(3, 5)
    rewards[0, 0] = 0.05
    built = critic.build_targets(kept, rewards, MASK, gamma=GAMMA, lam=0.0, generator=torch.Generator().manual_seed(0))
    levels = (torch.arange(64) + 0.5) / 64
    samples = histogram_samples(outputs.softmax(-1), levels, critic.edges, critic.sigma).double()
    torch.testing.assert_close(samples.mean(-1), critic.value(outputs).double(), rtol=0, atol=1e-6)
    for (row, here), following in {(0, 0): 1, (0, 1): 4, (1, 0): 2}.items():
        moved = (rewards[row, here].item() + GAMMA * samples[row, following]).clamp(-0.2, 1.2).tolist()
        expected = np.mean([masses(y, EDGES.tolist(), SIGMA) for y in moved], axis=0)
        assert built["histogram"][row, here].tolist() == pytest.approx(expected, abs=1e-5)
    # The last token has no next state: its return is its reward.
    assert built["histogram"][0, 4].tolist() == pytest.approx(masses(0.0, EDGES.tolist(), SIGMA), abs=1e-5)


def test_the_loss_and_its_gradient_are_those_of_a_loop_in_float64():
    critic = family(num_bins=7)
    g = torch.Generator().manual_seed(3)
    outputs = torch.randn(6, 7, generator=g).requires_grad_()
    histogram = torch.rand(6, 7, generator=g)
    histogram = histogram / histogram.sum(-1, keepdim=True)
    loss = critic.loss(outputs, {"histogram": histogram})
    weights = torch.linspace(0.5, 1.5, 6)
    (gradient,) = torch.autograd.grad((loss.total * weights).sum(), outputs)
    naive = outputs.detach().double().requires_grad_()
    for row in range(6):
        total = sum(naive[row, i].exp() for i in range(7))
        entropy = -sum(float(histogram[row, i]) * (naive[row, i].exp() / total).log() for i in range(7))
        assert loss.total[row].item() == pytest.approx(entropy.item(), rel=1e-5)
        (weights[row].double() * entropy).backward()
    torch.testing.assert_close(gradient.double(), naive.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.terms["cross_entropy"], loss.total)


def test_a_fresh_head_is_flat_and_its_value_in_the_middle():
    critic = family()
    weight, bias = torch.empty(51, 64), torch.empty(51)
    critic.init_head(weight, bias, torch.Generator().manual_seed(0))
    outputs = torch.randn(20, 64, generator=torch.Generator().manual_seed(1)) @ weight.T + bias
    assert (critic.value(outputs) - 0.5).abs().max() < 0.03
    entropy = torch.distributions.Categorical(logits=outputs).entropy()
    assert (entropy > 0.99 * math.log(51)).all()


# ---------------------------------------------------------------------- known distributions


def learn(critic: HLGaussFamily, *, updates: int = 300, batch: int = 64, lam: float = 0.95) -> torch.Tensor:
    """A table of logits (45 states, m) on the walk of 9 fair steps with reward 1{x > 0}, trained as the worker does."""
    process, rng = bernoulli_walk(9), np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    table = torch.zeros(process.num_states, critic.num_outputs, requires_grad=True)
    optimizer = torch.optim.Adam([table], lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, updates)
    mask = torch.ones(batch, 9)
    for _ in range(updates):
        visited, clean = process.sample(batch, rng)
        rewards = torch.zeros(batch, 9)
        rewards[:, -1] = torch.from_numpy(clean).float()
        states = torch.from_numpy(visited)
        kept = critic.keep(table.detach()[states])
        built = critic.build_targets(kept, rewards, mask, gamma=1.0, lam=lam, generator=generator)
        total = critic.loss(table[states].flatten(0, 1), {name: t.flatten(0, 1) for name, t in built.items()}).total
        optimizer.zero_grad()
        total.mean().backward()
        optimizer.step()
        schedule.step()
    return table.detach()


@pytest.mark.parametrize("target", ["lambda_return", "sample_replacement"])
def test_the_walks_values_are_found(target):
    process = bernoulli_walk(9)
    critic = family(target=target)
    table = learn(critic)
    truth = torch.from_numpy(process.truth() @ process.atoms)
    error = ((critic.value(table).double() - truth).square() @ torch.from_numpy(process.visits())).sqrt()
    assert error < 0.04
    spread = critic.statistics(table)["quantile/spread"][0].item()
    # A fair coin at the start has a standard deviation of ½. A λ-return averages over later values and knows less.
    if target == "sample_replacement":
        assert spread == pytest.approx(0.5, abs=0.02)
    else:
        assert 0.2 < spread < 0.48


# ---------------------------------------------------------------------- users


def test_it_has_no_samples_and_needs_none():
    assert not isinstance(family(), SampledFamily)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_bins": 1}, "critic.value.num_bins is 1; it must be an integer >= 2"),
        ({"value_max": -0.2}, "critic.value.value_max is -0.2; it must be a finite number > -0.2"),
        ({"value_min": float("-inf")}, "critic.value.value_min is -inf; it must be a finite number"),
        ({"sigma_ratio": 0.0}, "critic.value.sigma_ratio is 0.0; it must be a finite number > 0"),
        ({"target": "quantile_gae"}, "critic.value.target is 'quantile_gae'; it must be one of 'lambda_return'"),
        ({"num_samples": 1}, "critic.value.num_samples is 1; it must be an integer >= 2"),
        ({"cliprange": 0.5}, "critic.value.cliprange is no field of the family 'hl_gauss'"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        family_config("hl_gauss", **changes)


@pytest.mark.parametrize("target", ["lambda_return", "sample_replacement"])
def test_the_worker_trains_it_and_no_cut_changes_its_gradients(target, tmp_path_factory):
    model = harness.save_model(tmp_path_factory.mktemp("model"))
    value = {"family": "hl_gauss", "target": target, "num_bins": 11, "num_heads": None, "num_quantiles": None}
    found = []
    for size in (8, 1):
        engine = {"micro_batch_size_per_gpu": size, "infer_micro_batch_size_per_gpu": size}
        worker = harness.make_worker(model, value=value, engine=engine)
        gradients, batch = harness.capture_gradients(worker), harness.make_batch()
        harness.infer(worker, batch)
        found.append((harness.train(worker, batch), gradients))
    (metrics, whole), (others, pieces) = found
    scale = max(gradient.abs().max().item() for gradient in whole.values())
    assert scale > 0
    for name, gradient in whole.items():
        torch.testing.assert_close(pieces[name], gradient, rtol=1e-5, atol=1e-5 * scale)
    # The rewards of the harness are standard normal: many lie outside [-0.2, 1.2].
    outside = metrics["critic/hl_gauss/out_of_support"][0]
    assert 0.1 < outside < 1.0
    assert outside == pytest.approx(others["critic/hl_gauss/out_of_support"][0])
    assert {"critic/loss/cross_entropy", "critic/quantile/q50", "critic/quantile/spread"} <= metrics.keys()
