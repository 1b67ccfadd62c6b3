# SPDX-License-Identifier: Apache-2.0
"""The options of the actor's advantage against loops over one row at a time, in float64, and numbers by hand."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import torch
from torch import Tensor

from verl_dvpo.distributional.advantage_config import AdvantageConfig
from verl_dvpo.distributional.advantages import (
    actor_advantages,
    clip_rewards,
    effective_share,
    gae,
    gate_gain,
    gate_rewards,
    group_std,
    last_valid,
    length_lambda,
    precision_weights,
    winsorise_rewards,
)


def loop_gae(rewards: list[float], values: list[float], mask: list[int], gamma: float, lam: float) -> list[float]:
    """One row, over its valid positions alone; a masked position takes what the next valid one has."""
    found, following, running = [0.0] * len(rewards), 0.0, 0.0
    for t in reversed(range(len(rewards))):
        if mask[t]:
            running = rewards[t] + gamma * following - values[t] + gamma * lam * running
            following = values[t]
        found[t] = running
    return found


def ragged(seed: int, batch: int = 9, length: int = 70) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards at every position, values and a mask with holes, padding, a full row and a row that is all masked."""
    rng = torch.Generator().manual_seed(seed)
    mask = (torch.rand(batch, length, generator=rng) > 0.3).long()
    for row in range(batch):
        mask[row, int(torch.randint(1, length + 1, (1,), generator=rng)) :] = 0
    mask[0], mask[1] = 1, 0
    rewards, values = torch.randn(2, batch, length, generator=rng, dtype=torch.float64)
    return rewards, values, mask


def last_of(mask: list[int]) -> int | None:
    places = [t for t, is_valid in enumerate(mask) if is_valid]
    return places[-1] if places else None


# ---------------------------------------------------------------------------------------------------- lambda


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("lam", [1.0, 0.7, 0.0])
def test_gae_is_the_loop(gamma, lam):
    rewards, values, mask = ragged(0)
    got = gae(rewards, values, mask, gamma=gamma, lam=lam)
    rows = zip(rewards.tolist(), values.tolist(), mask.tolist(), strict=True)
    expected = torch.tensor([loop_gae(r, v, m, gamma, lam) for r, v, m in rows], dtype=torch.float64)
    torch.testing.assert_close(got, expected)
    assert got.dtype == torch.float64


def test_gae_by_hand_with_a_lambda_for_each_row():
    rewards = torch.tensor([[0.0, 5.0, 1.0], [0.0, 0.0, 1.0]])
    values = torch.tensor([[0.5, 9.0, 0.25], [0.5, 0.5, 0.25]])
    mask = torch.tensor([[1, 0, 1], [1, 1, 1]])
    # Row 0, λ = 0.5: the reward 5 and the value 9 are masked. A_2 = 1 − 0.25; A_0 = 0.25 − 0.5 + 0.5·0.75.
    # Row 1, λ = 0: only one-step errors.
    expected = torch.tensor([[0.125, 0.75, 0.75], [0.0, -0.25, 0.75]])
    torch.testing.assert_close(gae(rewards, values, mask, gamma=1.0, lam=torch.tensor([0.5, 0.0])), expected)


def test_length_lambda_is_the_loops():
    _, _, mask = ragged(1)
    rewards, values, _ = ragged(1)
    alpha = 0.2
    lams = []
    for row in mask.tolist():
        length = sum(row)
        lams.append(max(0.0, 1.0 - 1.0 / (alpha * length)) if length else 0.0)
    torch.testing.assert_close(length_lambda(mask, alpha=alpha), torch.tensor(lams, dtype=torch.float64))
    assert min(lams) == 0.0
    assert max(lams) > 0.9
    config = AdvantageConfig(lam_actor="length", length_alpha=alpha)
    got = actor_advantages(rewards, values, mask, config=config, gamma=0.95, lam=0.1, fields={})
    rows = zip(rewards.tolist(), values.tolist(), mask.tolist(), lams, strict=True)
    expected = [loop_gae(r, v, m, 0.95, lam) for r, v, m, lam in rows]
    torch.testing.assert_close(got.advantages, torch.tensor(expected, dtype=torch.float64))
    assert got.metrics["advantages/lam"].item() == pytest.approx(sum(lams) / len(lams))


def test_length_lambda_by_hand():
    """VAPO's α = 0.05: 100 tokens look 5 tokens ahead, 20 tokens and fewer one."""
    mask = torch.zeros(4, 100, dtype=torch.bool)
    for row, length in enumerate((100, 40, 20, 3)):
        mask[row, :length] = True
    expected = torch.tensor([0.8, 0.5, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(length_lambda(mask, alpha=0.05), expected)


def test_a_lambda_of_the_actor_replaces_the_other():
    rewards, values, mask = ragged(2)
    config = AdvantageConfig(lam_actor=0.3)
    got = actor_advantages(rewards, values, mask, config=config, gamma=0.9, lam=0.95, fields={}).advantages
    torch.testing.assert_close(got, gae(rewards, values, mask, gamma=0.9, lam=0.3))
    assert not torch.allclose(got, gae(rewards, values, mask, gamma=0.9, lam=0.95))


# ---------------------------------------------------------------------------------------------------- weights


def test_precision_weights_by_hand():
    sigma = torch.tensor([0.0, 0.5, 2.0])
    torch.testing.assert_close(precision_weights(sigma, eps=0.25), torch.tensor([4.0, 2.0, 1 / 4.25]))
    torch.testing.assert_close(precision_weights(sigma, eps=0.25, power=1), torch.tensor([4.0, 4 / 3, 1 / 2.25]))
    assert precision_weights(torch.zeros(3), eps=1e-6).isfinite().all()
    for eps in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"eps is .*; it must be greater than 0"):
            precision_weights(sigma, eps=eps)


def test_precision_weighting_multiplies_each_advantage():
    rewards, values, mask = ragged(3)
    sigma = torch.rand(rewards.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    config = AdvantageConfig(weighting="precision", weighting_eps=0.1)
    got = actor_advantages(rewards, values, mask, config=config, gamma=0.9, lam=0.8, fields={"value_sigma": sigma})
    weights: list[float] = []
    for b in range(len(mask)):
        plain = loop_gae(rewards[b].tolist(), values[b].tolist(), mask[b].tolist(), 0.9, 0.8)
        for t in range(mask.shape[1]):
            if mask[b, t]:
                weights.append(1.0 / (sigma[b, t].item() ** 2 + 0.1))
                assert got.advantages[b, t].item() == pytest.approx(plain[t] * weights[-1], rel=1e-9)
    share = sum(weights) ** 2 / (len(weights) * sum(w * w for w in weights))
    assert got.metrics["advantages/effective_share"].item() == pytest.approx(share)


def test_effective_share_by_hand():
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
    assert effective_share(torch.full((2, 3), 7.0), mask).item() == pytest.approx(1.0)
    one = torch.tensor([[1.0, 1e-9, 5.0], [1e-9, 1e-9, 5.0]])
    assert effective_share(one, mask).item() == pytest.approx(0.25)
    assert effective_share(one, torch.zeros(2, 3)).item() == 0.0


def test_group_std_is_that_of_the_totals_of_a_prompts_answers():
    rewards, _, mask = ragged(4, batch=12)
    groups = torch.tensor([7, 7, 7, 3, 3, 3, 3, 5, 2, 2, 7, 9])  # row 1 is masked; 5 and 9 have one answer
    totals: dict[int, list[float]] = {}
    for b, group in enumerate(groups.tolist()):
        if mask[b].any():
            totals.setdefault(group, []).append(float((rewards[b] * mask[b]).sum()))
    expected = [
        statistics.stdev(totals[g]) if mask[b].any() and len(totals[g]) > 1 else 1.0
        for b, g in enumerate(groups.tolist())
    ]
    torch.testing.assert_close(group_std(rewards, mask, groups), torch.tensor(expected, dtype=torch.float64))


def test_group_weighting_with_one_answer_per_prompt_weighs_all_alike():
    rewards, values, mask = ragged(5)
    config = AdvantageConfig(weighting="group_std", weighting_eps=0.25)
    groups = torch.arange(len(mask))
    got = actor_advantages(rewards, values, mask, config=config, gamma=1.0, lam=0.9, fields={}, groups=groups)
    torch.testing.assert_close(got.advantages, gae(rewards, values, mask, gamma=1.0, lam=0.9) / 1.25)
    with pytest.raises(ValueError, match=r"groups is None; weighting 'group_std' needs"):
        actor_advantages(rewards, values, mask, config=config, gamma=1.0, lam=0.9, fields={})


# ---------------------------------------------------------------------------------------------------- rewards


def test_last_valid_is_the_last_one():
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    index, exists = last_valid(mask)
    assert index[exists].tolist() == [2, 3, 0]
    assert exists.tolist() == [True, False, True, True]


def test_winsorised_rewards_are_the_loops():
    rewards, _, mask = ragged(6, batch=40)
    rng = torch.Generator().manual_seed(1)
    low, width, sigma = torch.rand(3, *rewards.shape, generator=rng, dtype=torch.float64)
    low, high, k = low - 1.0, low - 1.0 + width, 0.3
    expected, drawn = rewards.clone(), [0, 0]
    for b, row in enumerate(mask.tolist()):
        t = last_of(row)
        if t is None:
            continue
        floor, ceiling = (low[b, t] - k * sigma[b, t]).item(), (high[b, t] + k * sigma[b, t]).item()
        reward = rewards[b, t].item()
        drawn[0] += reward < floor
        drawn[1] += reward > ceiling
        expected[b, t] = min(max(reward, floor), ceiling)
    assert min(drawn) > 0
    torch.testing.assert_close(winsorise_rewards(rewards, mask, low, high, sigma, widening=k), expected)


def test_an_outlier_is_drawn_in_at_the_last_valid_token():
    rewards = torch.tensor([[0.0, 0.5, 90.0, 0.0], [0.0, 0.0, -40.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    mask = torch.tensor([[1, 1, 1, 0]] * 3)
    fields = {
        "value_low": torch.full((3, 4), -1.0),
        "value_high": torch.full((3, 4), 2.0),
        "value_sigma": torch.full((3, 4), 0.5),
    }
    config = AdvantageConfig(reward="winsorised", reward_widening=2.0)
    values = torch.zeros(3, 4)
    got = actor_advantages(rewards, values, mask, config=config, gamma=1.0, lam=1.0, fields=fields)
    torch.testing.assert_close(got.advantages[:, 2], torch.tensor([3.0, -2.0, 1.0]))
    torch.testing.assert_close(got.advantages[:, 0], torch.tensor([3.5, -2.0, 1.0]))
    assert got.metrics["advantages/reward_change"].item() == pytest.approx((87 + 38) / 3)
    narrow = AdvantageConfig(reward="winsorised")
    del fields["value_sigma"]
    got = actor_advantages(rewards, values, mask, config=narrow, gamma=1.0, lam=1.0, fields=fields)
    torch.testing.assert_close(got.advantages[:, 2], torch.tensor([2.0, -1.0, 1.0]))


def test_the_gate_by_hand():
    epsilon, sigma = torch.tensor([1.0, 0.0, 2.0, 0.0]), torch.tensor([1.0, 2.0, 0.0, 0.0])
    torch.testing.assert_close(gate_gain(epsilon, sigma), torch.tensor([0.5, 0.0, 1.0, 1.0]))
    rewards, values = torch.tensor([[0.0, 3.0, 8.0]]), torch.tensor([[9.0, 1.0, 5.0]])
    mask = torch.tensor([[1, 1, 0]])
    got = gate_rewards(rewards, mask, values, torch.full((1, 3), 0.25))
    torch.testing.assert_close(got, torch.tensor([[0.0, 1.5, 8.0]]))
    assert torch.equal(gate_rewards(rewards, mask, values, torch.ones(1, 3)), rewards)


@pytest.mark.parametrize("gain", [None, 0.4])
def test_gated_rewards_are_the_loops(gain):
    rewards, values, mask = ragged(7)
    epsilon, sigma = torch.rand(2, *rewards.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    config = AdvantageConfig(reward="gated", gate_gain=gain)
    fields = {"value_disagreement": epsilon, "value_sigma": sigma}
    assert set(config.fields) == (set(fields) if gain is None else set())
    got = actor_advantages(rewards, values, mask, config=config, gamma=0.9, lam=0.8, fields=fields)
    expected, gains = [], []
    for b, row in enumerate(mask.tolist()):
        changed, t = rewards[b].tolist(), last_of(row)
        if t is not None:
            e, s = epsilon[b, t].item() ** 2, sigma[b, t].item() ** 2
            gains.append(e / (e + s) if gain is None else gain)
            changed[t] = values[b, t].item() + gains[-1] * (changed[t] - values[b, t].item())
        expected.append(loop_gae(changed, values[b].tolist(), row, 0.9, 0.8))
    torch.testing.assert_close(got.advantages, torch.tensor(expected, dtype=torch.float64))
    if gain is None:
        assert got.metrics["advantages/gate_gain"].item() == pytest.approx(sum(gains) / len(gains))


def test_clipped_rewards_are_those_of_the_batch():
    rewards = torch.zeros(12, 3)
    rewards[:11, 1] = torch.arange(11.0)
    rewards[:, 2] = 1000.0  # masked: no reward of the batch
    mask = torch.tensor([[1, 1, 0]]).repeat(12, 1)
    mask[11] = 0
    zeros = torch.zeros_like(rewards)
    got = clip_rewards(rewards, mask, zeros, low=0.1, high=0.75)
    # The quantiles of 0, 1, ..., 10 at 0.1 and 0.75 are 1 and 7.5.
    torch.testing.assert_close(got[:11, 1], torch.tensor([1.0, 1, 2, 3, 4, 5, 6, 7, 7.5, 7.5, 7.5]))
    assert torch.equal(got[11], rewards[11])
    assert torch.equal(got[:, 2], rewards[:, 2])
    nothing = torch.zeros(12, 3)
    assert torch.equal(clip_rewards(rewards, nothing, zeros, low=0.1, high=0.9), rewards)


def test_clipped_residuals_are_those_of_the_batch():
    rewards, values, mask = ragged(11)
    config = AdvantageConfig(reward="clipped_residual", reward_low=0.3, reward_high=0.6)
    got = actor_advantages(rewards, values, mask, config=config, gamma=0.9, lam=0.8, fields={})
    ends = [(b, t) for b, row in enumerate(mask.tolist()) if (t := last_of(row)) is not None]
    residuals = {b: rewards[b, t].item() - values[b, t].item() for b, t in ends}
    low, high = np.quantile(list(residuals.values()), [0.3, 0.6])
    assert sum(low < residual < high for residual in residuals.values()) < len(ends) - 1
    for b, t in ends:
        changed, row = rewards[b].tolist(), mask[b].tolist()
        changed[t] = values[b, t].item() + min(max(residuals[b], low), high)
        expected = torch.tensor(loop_gae(changed, values[b].tolist(), row, 0.9, 0.8), dtype=torch.float64)
        torch.testing.assert_close(got.advantages[b], expected)


# ---------------------------------------------------------------------------------------------------- together


def test_all_options_at_once_in_their_order():
    """The reward is changed first, then the GAE of the readout with the actor's λ, then the weights."""
    rewards, values, mask = ragged(8)
    rng = torch.Generator().manual_seed(3)
    sigma, low, width, readout = torch.rand(4, *rewards.shape, generator=rng, dtype=torch.float64)
    fields = {"value_sigma": sigma, "value_low": -low, "value_high": width, "value_readout": readout}
    config = AdvantageConfig(
        weighting="precision", weighting_eps=0.5, reward="winsorised", readout="median", lam_actor=0.6
    )
    assert set(config.fields) == set(fields)
    got = actor_advantages(rewards, values, mask, config=config, gamma=0.9, lam=0.1, fields=fields).advantages
    for b, row in enumerate(mask.tolist()):
        changed, t = rewards[b].tolist(), last_of(row)
        if t is not None:
            changed[t] = min(max(changed[t], fields["value_low"][b, t].item()), fields["value_high"][b, t].item())
        plain = loop_gae(changed, readout[b].tolist(), row, 0.9, 0.6)
        for t in range(mask.shape[1]):
            if row[t]:
                assert got[b, t].item() == pytest.approx(plain[t] / (sigma[b, t].item() ** 2 + 0.5), rel=1e-9)


def test_a_missing_field_is_named():
    rewards, values, mask = ragged(9)
    config = AdvantageConfig(reward="gated")
    with pytest.raises(ValueError, match="value_disagreement"):
        actor_advantages(rewards, values, mask, config=config, gamma=1, lam=1, fields={"value_sigma": values})


def test_fields_are_those_that_an_option_reads():
    ends = ("value_low", "value_high")
    assert AdvantageConfig(reward="winsorised").fields == ends
    assert AdvantageConfig(reward="winsorised", reward_widening=0.1).fields == ("value_sigma", *ends)
    for control in ("clipped", "clipped_residual"):
        assert AdvantageConfig(reward=control, weighting="group_std", lam_actor="length").fields == ()


def test_nothing_carries_a_gradient_and_inputs_stay_as_they_were():
    rewards, values, mask = ragged(10)
    before = rewards.clone(), values.clone(), mask.clone()
    config = AdvantageConfig(reward="clipped", lam_actor="length")
    got = actor_advantages(rewards, values.requires_grad_(), mask, config=config, gamma=0.9, lam=0.8, fields={})
    assert not got.advantages.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, (rewards, values, mask), strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weighting": "variance"}, "weighting is 'variance'; it must be one of none, precision, group_std"),
        ({"weighting_eps": 0.0}, "weighting_eps is 0.0; it must be a finite number greater than 0"),
        ({"weighting_eps": "small"}, "weighting_eps is 'small'; it must be a finite number"),
        ({"weighting_power": 3}, "weighting_power is 3; it must be 1 or 2"),
        ({"reward": "trimmed"}, "reward is 'trimmed'; it must be one of raw, winsorised, gated, clipped"),
        ({"reward_low": 0.0}, r"reward_low is 0.0; it must be a level in \(0, 1\)"),
        ({"reward_high": float("nan")}, r"reward_high is nan; it must be a level in \(0, 1\)"),
        ({"reward_low": 0.95}, "reward_low is 0.95; it must be below reward_high, which is 0.95"),
        ({"reward_widening": -0.1}, "reward_widening is -0.1; it must be a finite number of at least 0"),
        ({"gate_gain": 1.1}, r"gate_gain is 1.1; it must be null or a number in \[0, 1\]"),
        ({"readout": "mode"}, "readout is 'mode'; it must be one of mean, median, trimmed, cvar"),
        ({"readout_level": 0}, r"readout_level is 0; it must be in \(0, 1\]"),
        (
            {"readout": "trimmed", "readout_level": "auto"},
            "readout_level is 'auto'; 'auto' is a level of readout 'cvar'",
        ),
        ({"readout": "cvar", "readout_level": "low"}, "readout_level is 'low'; it must be in"),
        ({"readout": "trimmed", "readout_level": 0.5}, "readout_level is 0.5; with readout 'trimmed' it must be in"),
        ({"lam_actor": "long"}, r"lam_actor is 'long'; it must be null, a number in \[0, 1\] or 'length'"),
        ({"lam_actor": True}, "lam_actor is True; it must be null"),
        ({"length_alpha": 0}, "length_alpha is 0; it must be a finite number greater than 0"),
    ],
)
def test_settings_have_bounds(settings, message):
    with pytest.raises(ValueError, match=message):
        AdvantageConfig(**settings)
