# SPDX-License-Identifier: Apache-2.0
"""Eq 2 and sample replacement against verl's own function, a loop over the definition, and hand-worked numbers."""

from __future__ import annotations

import pytest
import torch
import verl.utils.torch_functional as verl_F
from verl.trainer.ppo.core_algos import compute_gae_advantage_return

from verl_dvpo.distributional import distributional_gae, sample_replacement_returns


def random_case(batch, length, size, seed, dtype=torch.float64):
    torch.manual_seed(seed)
    rewards = torch.randn(batch, length, dtype=dtype)
    quantiles = torch.randn(batch, length, size, dtype=dtype)
    mask = (torch.rand(batch, length) < 0.7).to(dtype)
    mask[0] = 1  # one full row, one empty, one with its tail cut off, one that starts with a gap
    mask[1] = 0
    mask[2, length // 2 :] = 0
    mask[3, : length // 3] = 0
    return rewards, quantiles, mask


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (1.0, 1.0), (0.0, 0.5)])
@pytest.mark.parametrize("length", [1, 2, 31, 33, 40, 1030])
def test_every_quantile_is_verls_gae(gamma, lam, length):
    rewards, quantiles, mask = random_case(5, length, 3, length)
    targets, advantages = distributional_gae(rewards, quantiles, mask, gamma=gamma, lam=lam)
    for j in range(3):
        _, expected = compute_gae_advantage_return(rewards, quantiles[..., j], mask, gamma, lam)
        torch.testing.assert_close(targets[..., j], expected, rtol=1e-12, atol=1e-12)
    # The identity of docs/method.md, section 3: the mean over quantiles is scalar GAE on the mean value.
    whitened, _ = compute_gae_advantage_return(rewards, quantiles.mean(-1), mask, gamma, lam)
    torch.testing.assert_close(verl_F.masked_whiten(advantages, mask), whitened, rtol=1e-10, atol=1e-10)


def test_float32_over_8192_tokens_equals_float64():
    rewards, quantiles, mask = random_case(4, 8192, 2, 0)
    for gamma, lam in ((1.0, 1.0), (0.999, 0.95)):
        exact, exact_advantages = distributional_gae(rewards, quantiles, mask, gamma=gamma, lam=lam)
        single, advantages = distributional_gae(rewards.float(), quantiles.float(), mask, gamma=gamma, lam=lam)
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(advantages.double(), exact_advantages, rtol=1e-5, atol=1e-3)


def test_hand_worked_gae_with_a_gap():
    # γ = 1, λ = ½, values 1, 9 (masked), 2, rewards 0, 7 (masked), 3.
    # t=2: δ = 3 − 2 = 1, A = 1, target 3. t=1 masked: carries A = 1 and next value 2; target 9 + 1 = 10 as in verl.
    # t=0: δ = 0 + 2 − 1 = 1, A = 1 + ½·1 = 1.5, target 2.5.
    targets, advantages = distributional_gae(
        torch.tensor([[0.0, 7, 3]]), torch.tensor([[[1.0], [9], [2]]]), torch.tensor([[1, 0, 1]]), gamma=1.0, lam=0.5
    )
    assert targets.flatten().tolist() == [2.5, 10.0, 3.0]
    assert advantages.flatten().tolist() == [1.5, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16])
def test_mask_of_any_dtype(dtype):
    rewards, quantiles, mask = random_case(4, 50, 3, 1)
    expected = distributional_gae(rewards, quantiles, mask, gamma=0.9, lam=0.8)
    found = distributional_gae(rewards, quantiles, mask.to(dtype), gamma=0.9, lam=0.8)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_is_masked_has_no_influence_and_inputs_stay():
    rewards, quantiles, mask = random_case(4, 60, 3, 2)
    expected, advantages = distributional_gae(rewards, quantiles, mask, gamma=1.0, lam=0.9)
    rewards[mask == 0], quantiles[mask == 0] = torch.nan, torch.inf
    before = rewards.clone(), quantiles.clone()
    found, found_advantages = distributional_gae(rewards, quantiles, mask, gamma=1.0, lam=0.9)
    assert torch.equal(found[mask == 1], expected[mask == 1])
    assert torch.equal(found_advantages, advantages)
    samples = sample_replacement_returns(rewards, quantiles, mask, gamma=1.0, lam=0.9)
    assert samples.isfinite().all()
    assert torch.equal(rewards.nan_to_num(), before[0].nan_to_num())
    assert torch.equal(quantiles, before[1])


def test_nan_at_a_valid_position_shows_before_it_only():
    rewards, quantiles, mask = random_case(4, 40, 3, 3)
    mask[0] = 1
    quantiles[0, 20, 1] = torch.nan
    targets, advantages = distributional_gae(rewards, quantiles, mask, gamma=1.0, lam=0.9)
    assert targets[0, :21, 1].isnan().all()
    assert targets[0, 21:].isfinite().all()
    assert targets[1:].isfinite().all()
    assert targets[0, :, 0].isfinite().all()
    assert advantages[0, :21].isnan().all()


def test_bfloat16_is_computed_in_float32():
    rewards, quantiles, mask = random_case(4, 40, 3, 4, torch.bfloat16)
    targets, _ = distributional_gae(rewards, quantiles, mask, gamma=1.0, lam=0.9)
    expected, _ = distributional_gae(rewards.float(), quantiles.float(), mask, gamma=1.0, lam=0.9)
    assert targets.dtype == torch.float32
    assert torch.equal(targets, expected)


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3)])
def test_empty_batches(shape):
    rewards, quantiles, mask = torch.zeros(shape[:2]), torch.zeros(shape), torch.ones(shape[:2])
    targets, advantages = distributional_gae(rewards, quantiles, mask, gamma=1.0, lam=0.9)
    assert targets.shape == shape
    assert advantages.shape == shape[:2]
    for lam in (0.5, 1.0):
        assert sample_replacement_returns(rewards, quantiles, mask, gamma=1.0, lam=lam).shape == shape


@pytest.mark.parametrize("length", [1, 33, 300])
def test_sample_replacement_with_lambda_1_is_the_monte_carlo_return(length):
    rewards, quantiles, mask = random_case(5, length, 4, length)
    samples = sample_replacement_returns(rewards, quantiles, mask, gamma=0.97, lam=1.0)
    # λ = 1 GAE on a value of 0 is the discounted return, by verl's own loop.
    _, returns = compute_gae_advantage_return(rewards, torch.zeros_like(rewards), mask, 0.97, 1.0)
    torch.testing.assert_close(samples, returns[..., None].expand_as(samples), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [2, 33, 300])
def test_sample_replacement_with_lambda_0_permutes_the_next_state(length):
    rewards, quantiles, mask = random_case(5, length, 4, length)
    samples = sample_replacement_returns(rewards, quantiles, mask, gamma=0.9, lam=0.0)
    for b in range(5):
        valid = mask[b].nonzero().flatten().tolist()
        for t, following in zip(valid, [*valid[1:], None], strict=False):  # an empty row has no pair
            bootstrap = torch.zeros(4).double() if following is None else quantiles[b, following]
            expected = rewards[b, t] + 0.9 * bootstrap.sort().values
            torch.testing.assert_close(samples[b, t].sort().values, expected, rtol=1e-12, atol=1e-12)


def test_sample_replacement_draws_the_mixture_of_n_step_returns():
    """The samples of the first token are, in distribution, the λ-mixture of n-step returns, enumerated exactly.

    5 tokens (one masked), M = 3, λ = 0.6: with 4000 equal rows each of the 3·3 bootstrapped outcomes and the terminal
    one has a known probability. Frequencies over 12000 samples agree within 4.5 binomial standard errors.
    """
    torch.manual_seed(5)
    gamma, lam, rows = 0.9, 0.6, 4000
    rewards = torch.tensor([[0.3, -1.0, 5.0, 0.2, 1.1]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 1, 1]])
    quantiles = torch.randn(1, 5, 3, dtype=torch.float64)
    expected: dict[float, float] = {}
    valid = [0, 1, 3, 4]
    collected, discount, reach = 0.0, 1.0, 1.0
    for here, following in zip(valid, [*valid[1:], None], strict=True):
        collected += discount * rewards[0, here].item()
        discount *= gamma
        if following is None:
            expected[round(collected, 9)] = reach
        else:
            for point in quantiles[0, following].tolist():
                expected[round(collected + discount * point, 9)] = reach * (1 - lam) / 3
            reach *= lam
    generator = torch.Generator().manual_seed(6)
    samples = sample_replacement_returns(
        rewards.expand(rows, -1),
        quantiles.expand(rows, -1, -1),
        mask.expand(rows, -1),
        gamma=gamma,
        lam=lam,
        generator=generator,
    )
    found = [round(v, 9) for v in samples[:, 0].flatten().tolist()]
    assert set(found) == set(expected)
    assert sum(expected.values()) == pytest.approx(1.0)
    for value, probability in expected.items():
        error = (probability * (1 - probability) / len(found)) ** 0.5
        assert found.count(value) / len(found) == pytest.approx(probability, abs=4.5 * error)


def test_every_sample_sees_every_point():
    """κ is uniform for each k on its own: sample 0 takes each of the next state's points equally often."""
    generator = torch.Generator().manual_seed(7)
    quantiles = torch.tensor([[[0.0, 0, 0, 0], [1, 2, 3, 4]]]).expand(8000, -1, -1)
    samples = sample_replacement_returns(
        torch.zeros(8000, 2), quantiles, torch.ones(8000, 2), gamma=1.0, lam=0.0, generator=generator
    )
    counts = torch.bincount(samples[:, 0, 0].long(), minlength=5)[1:]
    # 2000 expected, standard error √(8000·¼·¾) = 39
    assert ((counts - 2000).abs() < 4.5 * 39).all()


def test_generator_makes_it_repeatable():
    rewards, quantiles, mask = random_case(4, 30, 5, 8)
    first, second, other = (
        sample_replacement_returns(
            rewards, quantiles, mask, gamma=1.0, lam=0.7, generator=torch.Generator().manual_seed(s)
        )
        for s in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("rewards", "quantiles", "mask", "gamma", "lam", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), 1.0, 1.0, r"quantiles has shape \(2, 3\)"),
        (torch.zeros(2, 3), torch.zeros(2, 3, 0), torch.zeros(2, 3), 1.0, 1.0, r"\(2, 3, 0\)"),
        (torch.zeros(2, 4), torch.zeros(2, 3, 5), torch.zeros(2, 3), 1.0, 1.0, r"rewards has shape \(2, 4\)"),
        (torch.zeros(2, 3), torch.zeros(2, 3, 5), torch.zeros(2), 1.0, 1.0, r"mask has shape \(2,\)"),
        (torch.zeros(2, 3), torch.zeros(2, 3, 5), torch.zeros(2, 3), 1.1, 1.0, "gamma is 1.1"),
        (torch.zeros(2, 3), torch.zeros(2, 3, 5), torch.zeros(2, 3), 1.0, -0.1, "lam is -0.1"),
    ],
)
@pytest.mark.parametrize("function", [distributional_gae, sample_replacement_returns])
def test_bad_input_is_named(function, rewards, quantiles, mask, gamma, lam, message):
    with pytest.raises(ValueError, match=message):
        function(rewards, quantiles, mask, gamma=gamma, lam=lam)
