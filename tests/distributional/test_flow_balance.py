# SPDX-License-Identifier: Apache-2.0
"""FlowRL's balance against loops in float64 over the paper's formula, on ragged masks with holes."""

import math
import statistics

import pytest
import torch

from verl_dvpo.distributional.flow_balance import (
    balance_advantages,
    balance_loss,
    balance_rewards,
    group_normalised,
)

GROUPS = torch.tensor([4, 4, 4, 9, 9, 1, 4])
BETA = 15.0


def batch() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(2)
    rewards, old, new, ref, values = torch.randn(5, 7, 9, generator=rng, dtype=torch.float64)
    mask = (torch.rand(7, 9, generator=rng) > 0.3).long()
    mask[:, 0] = 1
    mask[2, 4:] = 0
    mask[6] = 0  # a row of padding, of the first group
    old, ref = old - 2, ref - 2
    return {"rewards": rewards, "old": old, "new": old + 0.1 * new, "ref": ref, "values": values, "mask": mask}


def valid(row: torch.Tensor, mask: torch.Tensor) -> list[float]:
    return [x for x, inside in zip(row.tolist(), mask.tolist(), strict=True) if inside]


def naive_rewards(data) -> list[float]:
    """r̂ of each row by the group's own mean and standard deviation."""
    totals = [sum(valid(r, m)) for r, m in zip(data["rewards"], data["mask"], strict=True)]
    exists = [bool(m.any()) for m in data["mask"]]
    found = []
    for row, total in enumerate(totals):
        group = [t for t, g, e in zip(totals, GROUPS, exists, strict=True) if e and g == GROUPS[row]]
        single = len(group) < 2
        found.append(total if single else (total - statistics.mean(group)) / (statistics.stdev(group) + 1e-6))
    return [r if e else 0.0 for r, e in zip(found, exists, strict=True)]


def naive_losses(data, new) -> list[float]:
    """w·δ² with δ = log Z + log π/|y| − β·r̂ − log π_ref/|y|, log Z the value of the first position."""
    found = []
    for row, reward in enumerate(naive_rewards(data)):
        mask = data["mask"][row]
        if not mask.any():
            found.append(0.0)
            continue
        old, now, ref = (valid(each[row], mask) for each in (data["old"], new, data["ref"]))
        delta = data["values"][row, 0].item() + statistics.mean(now) - BETA * reward - statistics.mean(ref)
        weight = min(max(math.exp(sum(now) - sum(old)), 0.8), 1.28)
        found.append(weight * delta**2)
    return found


def losses_of(data, new):
    rewards = balance_rewards(data["rewards"], data["old"], data["ref"], data["mask"], GROUPS, beta=BETA)
    advantages, _ = balance_advantages(rewards, data["values"], data["mask"])
    return balance_loss(data["old"], new, advantages, data["mask"], clip_low=0.2, clip_high=0.28)


def test_rewards_are_normalised_among_the_answers_to_a_prompt():
    data = batch()
    found = group_normalised(data["rewards"], data["mask"], GROUPS)
    assert found.tolist() == pytest.approx(naive_rewards(data))
    same = group_normalised(torch.ones(3, 2), torch.ones(3, 2), torch.zeros(3, dtype=torch.int64))
    assert same.tolist() == [0.0, 0.0, 0.0]


def test_the_loss_is_the_papers_formula_answer_by_answer():
    data = batch()
    losses, weights = losses_of(data, data["new"])
    assert losses[:6].tolist() == pytest.approx(naive_losses(data, data["new"])[:6])
    assert {w for w in weights.tolist() if w in (0.8, 1.28)}  # some are clipped
    assert any(w not in (0.8, 1.0, 1.28) for w in weights.tolist())
    assert losses[6] == 0  # padding has no advantage and no log-probability


def test_its_gradient_is_that_of_the_formula_with_a_weight_that_is_no_function_of_the_policy():
    data = batch()
    leaf = data["new"].clone().requires_grad_()
    losses_of(data, leaf)[0].sum().backward()
    rewards = naive_rewards(data)
    for row in range(7):
        mask = data["mask"][row]
        if not mask.any():
            assert not leaf.grad[row].any()
            continue
        old, now, ref = (valid(data[name][row], mask) for name in ("old", "new", "ref"))
        delta = data["values"][row, 0].item() + statistics.mean(now) - BETA * rewards[row] - statistics.mean(ref)
        weight = min(max(math.exp(sum(now) - sum(old)), 0.8), 1.28)
        expected = [2 * weight * delta / len(now) if inside else 0.0 for inside in mask.tolist()]
        assert leaf.grad[row].tolist() == pytest.approx(expected)


def test_the_mean_over_answers_is_least_where_the_critic_is_the_mean_of_its_rewards():
    """At π = π_old the squares of b − log Z are least at the mean of b: what the critic of the prompt regresses on."""
    data = batch()
    rewards = balance_rewards(data["rewards"], data["old"], data["ref"], data["mask"], GROUPS, beta=BETA)
    rows = [0, 1, 2]  # one prompt
    best = rewards.sum(-1)[rows].mean().item()

    def loss(log_z: float) -> float:
        data["values"][rows, 0] = log_z
        return losses_of(data, data["old"])[0][rows].mean().item()

    assert loss(best) < loss(best + 0.01)
    assert loss(best) < loss(best - 0.01)


def test_the_reward_stands_at_the_last_valid_token_alone():
    data = batch()
    rewards = balance_rewards(data["rewards"], data["old"], data["ref"], data["mask"], GROUPS, beta=BETA)
    for row in range(6):
        last = max(t for t in range(9) if data["mask"][row, t])
        assert [t for t in range(9) if rewards[row, t] != 0] == [last]
    assert not rewards[6].any()
    advantages, returns = balance_advantages(rewards, data["values"], data["mask"])
    assert not (advantages * (1 - data["mask"])).any()
    assert not (returns * (1 - data["mask"])).any()
    torch.testing.assert_close(returns[0, 0], rewards[0].sum())


def test_an_extreme_ratio_is_finite():
    old, new = torch.full((1, 4), -90.0), torch.zeros(1, 4, requires_grad=True)
    losses, weight = balance_loss(old, new, torch.zeros(1, 4), torch.ones(1, 4), clip_low=0.2, clip_high=0.28)
    losses.sum().backward()
    assert weight.item() == pytest.approx(1.28)
    assert new.grad.isfinite().all()
