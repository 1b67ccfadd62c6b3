# SPDX-License-Identifier: Apache-2.0
"""The estimator against verl's own, and its options against numpy."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from verl.trainer.ppo.core_algos import (
    compute_gae_advantage_return,
    compute_grpo_outcome_advantage,
    get_adv_estimator_fn,
)

from verl_dvpo.estimator import advantage_config, compute_dvpo_advantage

OFF = [
    None,
    {},
    {"lam": 0.3},
    {"value": None},
    {"value": {}},
    {"value": {"weighting": "none", "weighting_eps": 9.0, "reward": "raw", "readout": "mean", "lam_actor": None}},
]


def batch(rows: int = 7, length: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, rows, length, generator=rng)
    mask = (torch.rand(rows, length, generator=rng) > 0.3).long()
    mask[1], mask[2, 4:], mask[3] = 0, 0, 1
    return rewards, mask, values


@pytest.mark.parametrize("config", OFF)
def test_without_an_option_it_is_verls_gae_to_the_bit(config):
    rewards, mask, values = batch()
    expected = compute_gae_advantage_return(rewards, values, mask, 0.97, 0.9)
    section = OmegaConf.create(config) if config is not None else None
    metrics: dict[str, float] = {}
    got = get_adv_estimator_fn("dvpo")(
        token_level_rewards=rewards,
        response_mask=mask,
        values=values,
        gamma=0.97,
        lam=0.9,
        config=section,
        index=np.array(list("aabbccd"), dtype=object),
        metrics=metrics,
    )
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert metrics == {}


def weighted(section: dict, sigma: torch.Tensor | None = None, index: list[str] | None = None, seed: int = 0, **more):
    rewards, mask, values = batch(seed=seed)
    metrics: dict[str, float] = {}
    fields = {} if sigma is None else {"value_sigma": sigma}
    names = None if index is None else np.array(index, dtype=object)
    found = compute_dvpo_advantage(
        rewards,
        mask,
        values,
        1.0,
        0.9,
        config=OmegaConf.create({"value": section}),
        fields=fields | more,
        index=names,
        metrics=metrics,
    )
    return *found, metrics


def whitened(advantages: np.ndarray, mask: np.ndarray) -> np.ndarray:
    valid = advantages[mask > 0]
    return (advantages - valid.mean()) / np.sqrt(valid.var(ddof=1) + 1e-8)


def raw_advantages(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """verl's returns minus the values are its advantages before whitening."""
    rewards, mask, values = batch(seed=seed)
    _, returns = compute_gae_advantage_return(rewards.double(), values.double(), mask, 1.0, 0.9)
    return (returns - values).numpy(), mask.numpy()


def test_precision_weights_come_before_whitening():
    sigma = torch.rand(7, 12, generator=torch.Generator().manual_seed(4)) * 2
    advantages, returns, metrics = weighted({"weighting": "precision", "weighting_eps": 0.25}, sigma)
    raw, mask = raw_advantages()
    expected = whitened(raw / (sigma.double().numpy() ** 2 + 0.25), mask)
    np.testing.assert_allclose(advantages.numpy()[mask > 0], expected[mask > 0], rtol=1e-4, atol=1e-5)
    valid = advantages.numpy()[mask > 0]
    assert valid.mean() == pytest.approx(0.0, abs=1e-6)
    assert valid.std(ddof=1) == pytest.approx(1.0, rel=1e-5)
    assert 0.0 < metrics["advantages/effective_share"] < 1.0
    rewards, mask_, values = batch()
    assert torch.equal(returns, compute_gae_advantage_return(rewards, values, mask_, 1.0, 0.9)[1])


@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_equal_spreads_change_nothing_but_the_rounding(spread):
    """Whitening takes the common factor out again; σ = 0 everywhere stays finite."""
    advantages, _, metrics = weighted({"weighting": "precision"}, torch.full((7, 12), spread))
    raw, mask = raw_advantages()
    np.testing.assert_allclose(advantages.numpy()[mask > 0], whitened(raw, mask)[mask > 0], rtol=1e-4, atol=1e-5)
    assert metrics["advantages/effective_share"] == pytest.approx(1.0)


def test_the_weight_of_a_state_shrinks_with_its_spread():
    """Ten times the spread on one row: its advantages lose weight against the others'."""
    sigma = torch.full((7, 12), 0.5)
    sigma[3] = 5.0
    advantages, _, _ = weighted({"weighting": "precision"}, sigma)
    plain, _, _ = weighted({"weighting": "precision"}, torch.full((7, 12), 0.5))
    assert advantages[3].std() < 0.1 * plain[3].std()


def test_group_std_with_power_one_divides_as_grpo_does():
    """A critic of constant V = the group's mean and λ = 1 has GRPO's advantage, before whitening."""
    rewards = torch.zeros(6, 3)
    rewards[:, -1] = torch.tensor([1.0, 0.0, 4.0, 0.0, 2.0, 7.0])
    mask = torch.ones(6, 3)
    index = np.array(["a", "a", "b", "b", "b", "c"], dtype=object)
    means = torch.tensor([0.5, 0.5, 2.0, 2.0, 2.0, 0.0])
    section = {"weighting": "group_std", "weighting_power": 1, "weighting_eps": 1e-6}
    got, _ = compute_dvpo_advantage(
        rewards,
        mask,
        means[:, None].expand(6, 3).contiguous(),
        1.0,
        1.0,
        config=OmegaConf.create({"value": section}),
        index=index,
    )
    grpo, _ = compute_grpo_outcome_advantage(rewards.clone(), mask, index)
    expected = whitened(grpo.double().numpy(), mask.numpy())
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_one_answer_per_prompt_has_no_group():
    """As off, up to rounding; the precision weight, which needs no group, still acts."""
    advantages, _, _ = weighted({"weighting": "group_std"}, index=list("abcdefg"))
    raw, mask = raw_advantages()
    np.testing.assert_allclose(advantages.numpy()[mask > 0], whitened(raw, mask)[mask > 0], rtol=1e-4, atol=1e-5)


def test_an_adaptive_cvar_has_one_level_for_the_batch():
    """It is verl's GAE of the blend, and the level is logged; whatever stands at masked tokens is ignored."""
    rewards, mask, values = batch()
    rng = torch.Generator().manual_seed(8)
    fields = {f"value_cvar_{n}": torch.randn(7, 12, generator=rng) for n in (10, 25, 50)}
    spread, apart = torch.rand(2, 7, 12, generator=rng)
    fields |= {"value_sigma": spread.masked_fill(mask == 0, 0.0), "value_disagreement": apart * mask + 9.0 * (1 - mask)}
    advantages, returns, metrics = weighted({"readout": "cvar", "readout_level": "auto"}, **fields)
    known = (spread**2 * mask).sum() / ((spread**2 + apart**2) * mask).sum()
    level = metrics["advantages/readout_level"]
    assert level == pytest.approx(known.item(), rel=1e-5)
    assert 0.25 < level < 0.5 or 0.5 < level < 1.0
    low, high = ("value_cvar_25", "value_cvar_50") if level < 0.5 else ("value_cvar_50", None)
    share = (level - 0.25) / 0.25 if level < 0.5 else (level - 0.5) / 0.5
    blend = (1 - share) * fields[low] + share * (fields[high] if high else values)
    expected, _ = compute_gae_advantage_return(rewards, blend, mask, 1.0, 0.9)
    torch.testing.assert_close(advantages, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(returns, compute_gae_advantage_return(rewards, values, mask, 1.0, 0.9)[1])


def test_a_readout_is_the_actors_value_and_not_that_of_the_returns():
    readout = torch.randn(7, 12, generator=torch.Generator().manual_seed(8))
    advantages, returns, _ = weighted({"readout": "median"}, value_readout=readout)
    rewards, mask, values = batch()
    expected, _ = compute_gae_advantage_return(rewards, readout, mask, 1.0, 0.9)
    torch.testing.assert_close(advantages[mask > 0], expected[mask > 0], rtol=1e-4, atol=1e-5)
    assert torch.equal(returns, compute_gae_advantage_return(rewards, values, mask, 1.0, 0.9)[1])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"weighting_eps": 0}, "algorithm.value.weighting_eps is 0; it must be a finite number greater than 0"),
        (
            {"weights": "precision"},
            "algorithm.value.weights is 'precision'; there is no such field; use one of weighting",
        ),
        ({"lam_actor": 1.5}, "algorithm.value.lam_actor is 1.5; it must be null"),
    ],
)
def test_errors_name_the_field(section, message):
    with pytest.raises(ValueError, match=message):
        advantage_config(OmegaConf.create({"value": section}))


def test_verls_own_trainers_pass_no_values():
    rewards, mask, _ = batch()
    with pytest.raises(
        ValueError, match=r"algorithm.adv_estimator is 'dvpo'; it is allowed under trainers that pass values"
    ):
        compute_dvpo_advantage(rewards, mask)
