# SPDX-License-Identifier: Apache-2.0
"""robust_bellman whose heads see different data: against loops, and against the known truth of noisy rewards."""

import re

import pytest
import torch
from verl.trainer.ppo.core_algos import compute_gae_advantage_return, compute_value_loss

from verl_dvpo.critic.config import family_config
from verl_dvpo.critic.store import prompt_keys
from verl_dvpo.families.check import check_family
from verl_dvpo.families.robust_bellman import HEADS_SEE, RobustBellmanConfig, RobustBellmanFamily

GAMMA, LAM, CLIP = 0.9, 0.8, 0.3
#: −E[min] of three independent standard normal numbers: 3/(2√π).
MINIMUM_OF_3 = 0.8463


def family(**settings) -> RobustBellmanFamily:
    return RobustBellmanFamily(RobustBellmanConfig(**{"cliprange": CLIP, **settings}))


def batch(seed: int = 0) -> tuple[torch.Tensor, ...]:
    """old outputs and outputs (6, 5, 3), rewards and mask (6, 5), with a hole, a padded tail and an empty row."""
    g = torch.Generator().manual_seed(seed)
    old = torch.randn(6, 5, 3, generator=g)
    outputs = old + torch.randn(6, 5, 3, generator=g)
    rewards, mask = torch.randn(6, 5, generator=g), torch.ones(6, 5)
    mask[0, 1:3] = 0
    mask[1, 3:] = 0
    mask[2] = 0
    return old, outputs, rewards, mask


def total_loss(critic, outputs, targets, mask) -> torch.Tensor:
    flat = {name: tensor.flatten(0, 1) for name, tensor in targets.items()}
    return (critic.loss(outputs.flatten(0, 1), flat).total * mask.flatten()).sum() / mask.sum()


@pytest.mark.parametrize("heads_see", ["bootstrap", "shards"])
def test_the_loss_is_verls_head_by_head_and_sequence_by_sequence_with_the_weights(heads_see):
    critic = family(heads_see=heads_see)
    old, outputs, rewards, mask = batch()
    built = critic.build_targets(
        critic.keep(old), rewards, mask, gamma=GAMMA, lam=LAM, generator=torch.Generator().manual_seed(5)
    )
    weights = built["weights"]
    assert torch.equal(weights, weights[:, :1].expand_as(weights))  # one weight for a whole sequence
    _, returns = compute_gae_advantage_return(rewards, old.min(-1).values, mask, gamma=GAMMA, lam=LAM)
    expected = 0.0
    for row in range(6):
        for head in range(3):
            if mask[row].any():
                at = (outputs[row, None, :, head], returns[row, None], old[row, None, :, head], mask[row, None])
                own = compute_value_loss(*at, cliprange_value=CLIP)[0] * mask[row].sum() / mask.sum()
                expected += weights[row, 0, head] * own / 3
    torch.testing.assert_close(total_loss(critic, outputs, built, mask), expected, rtol=1e-5, atol=1e-6)


def test_all_draws_nothing_and_is_what_weights_of_one_give():
    old, outputs, rewards, mask = batch(1)
    critic = family()
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    built = critic.build_targets(critic.keep(old), rewards, mask, gamma=GAMMA, lam=LAM, generator=generator)
    assert built.keys() == {"returns", "values"}
    assert torch.equal(generator.get_state(), state)
    ones = built | {"weights": torch.ones_like(old)}
    assert torch.equal(total_loss(critic, outputs, built, mask), total_loss(critic, outputs, ones, mask))
    assert critic.statistics(outputs).keys() == {"ensemble/std"}


def test_one_head_with_a_shard_of_its_own_is_the_degenerate_case():
    one, alone = family(num_heads=1), family(num_heads=1, heads_see="shards")
    old, outputs, rewards, mask = (x[..., :1] if x.ndim == 3 else x for x in batch(2))
    losses = [
        total_loss(c, outputs, c.build_targets(old, rewards, mask, gamma=GAMMA, lam=LAM), mask) for c in (one, alone)
    ]
    assert torch.equal(*losses)


def test_bootstrap_weights_are_poisson_and_follow_the_generator():
    critic, kept = family(heads_see="bootstrap"), torch.zeros(20_000, 1, 3)

    def draw(seed: int) -> torch.Tensor:
        g = torch.Generator().manual_seed(seed)
        built = critic.build_targets(kept, torch.zeros(20_000, 1), torch.ones(20_000, 1), gamma=1, lam=1, generator=g)
        return built["weights"][:, 0].double()

    weights = draw(0)
    assert torch.equal(weights, draw(0))
    assert not torch.equal(weights, draw(1))
    # Mean and variance 1, P(0) = P(1) = 1/e, and heads know nothing of each other; 4 standard errors are 0.03 to 0.05.
    torch.testing.assert_close(weights.mean(0), torch.ones(3).double(), rtol=0, atol=0.03)
    torch.testing.assert_close(torch.cov(weights.T), torch.eye(3).double(), rtol=0, atol=0.05)
    torch.testing.assert_close((weights == 0).double().mean(), torch.tensor(0.3679).double(), rtol=0, atol=0.01)


def test_all_answers_to_a_prompt_go_to_one_head_whatever_batch_they_are_in():
    critic = family(heads_see="shards")
    assert critic.sees_prompts
    prompts = [torch.tensor(tokens) for tokens in ([5, 6], [5, 6, 7], [5, 6], [6, 5], [5], [5, 6])]
    keys = prompt_keys(torch.nested.as_nested_tensor(prompts, layout=torch.jagged))
    assert len({int(keys[i]) for i in (0, 1, 3, 4)}) == 4
    assert keys[0] == keys[2] == keys[5]
    assert (keys >= 0).all()

    def owners(rows: list[int]) -> list[list[float]]:
        zeros = torch.zeros(len(rows), 4)
        built = critic.build_targets(
            torch.zeros(len(rows), 4, 3), zeros, torch.ones_like(zeros), gamma=1, lam=1, prompts=keys[rows]
        )
        return built["weights"][:, 0].tolist()

    whole = owners([0, 1, 2, 3, 4, 5])
    assert all(sorted(row) == [0.0, 0.0, 3.0] for row in whole)
    assert whole[0] == whole[2] == whole[5]
    assert owners([5, 3]) == [whole[5], whole[3]]
    # A thousand prompts spread over the three heads: 333 each, 4 standard deviations are 60.
    many = prompt_keys(torch.nested.as_nested_tensor(list(torch.arange(1000).split(1)), layout=torch.jagged))
    assert all(abs(int(n) - 333) < 60 for n in (many % 3).bincount())


def learned(heads_see: str, noise: float) -> torch.Tensor:
    """Learns 2,000 states of mean reward 0.5 side by side with plain SGD: heads (2000, 3) after 150 updates."""
    states, size, rate = 2000, 15, 0.1
    critic = family(heads_see=heads_see, cliprange=1e9)
    g = torch.Generator().manual_seed(0)
    table = 0.1 * torch.randn(states, 3, generator=g)
    mask = torch.ones(states * size, 1)
    for _ in range(150):
        leaf = table.requires_grad_()
        rewards = 0.5 + noise * torch.randn(states * size, 1, generator=g)
        outputs = leaf.repeat_interleave(size, 0)
        built = critic.build_targets(outputs.detach()[:, None], rewards, mask, gamma=1, lam=0.95, generator=g)
        loss = critic.loss(outputs, {name: tensor.squeeze(1) for name, tensor in built.items()})
        # Mean over a state's sequences and sum over heads: each head takes plain steps of ``rate``.
        (gradient,) = torch.autograd.grad(3 * loss.total.sum() / size, leaf)
        table = (table - rate * gradient).detach()
    return table.double()


@pytest.mark.parametrize(("heads_see", "own_variance"), [("bootstrap", 1.0), ("shards", 3.0)])
def test_the_minimum_lies_below_the_mean_by_an_amount_that_grows_with_noise(heads_see, own_variance):
    """Plain SGD of rate η on batches of n ends with variance η/(2−η)·E[w²]·σ²/n, of which E[w w'] is shared.

    What is a head's own: E[w²] − E[w w'] is 2 − 1 for Poisson weights and 3 − 0 for shards. Three such heads have
    their minimum 0.846 standard deviations below the truth.
    """
    for noise in (0.25, 0.5, 1.0):
        heads = learned(heads_see, noise)
        spread = noise * (own_variance * 0.1 / 1.9 / 15) ** 0.5
        assert heads.mean().item() == pytest.approx(0.5, abs=0.1 * spread)
        assert heads.amin(-1).mean().item() == pytest.approx(0.5 - MINIMUM_OF_3 * spread, abs=0.1 * spread)
        assert heads.std(-1).mean() > 0.5 * spread


def test_heads_that_see_all_agree_and_their_minimum_is_no_worst_case():
    heads = learned("all", 1.0)
    # First differences of about 0.1 shrink by (1 − 0.1)^150 = 1e-7.
    assert (heads.amax(-1) - heads.amin(-1)).max() < 1e-6
    assert heads.amin(-1).mean().item() == pytest.approx(0.5, abs=0.01)


def test_how_far_the_minimum_lies_below_is_measured():
    measured = family(heads_see="bootstrap").statistics(torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]]))
    assert measured["ensemble/below_mean"].tolist() == [2.0, 0.0]


@pytest.mark.parametrize("heads_see", HEADS_SEE)
def test_every_way_passes_the_check_of_a_family(heads_see):
    check_family(family(heads_see=heads_see))


def test_an_unknown_way_is_named():
    message = "critic.value.heads_see is 'some'; it must be one of 'all', 'bootstrap', 'shards'"
    with pytest.raises(ValueError, match=re.escape(message)):
        family_config("robust_bellman", heads_see="some")
