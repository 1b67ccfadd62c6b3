# SPDX-License-Identifier: Apache-2.0
"""scalar_ensemble and robust_bellman: against `scalar`, verl's own value loss, and float64 loops."""

import re

import pytest
import torch
from verl.trainer.ppo.core_algos import compute_gae_advantage_return, compute_value_loss

from verl_dvpo.critic.config import family_config
from verl_dvpo.families.robust_bellman import RobustBellmanConfig, RobustBellmanFamily
from verl_dvpo.families.scalar import ScalarConfig, ScalarFamily
from verl_dvpo.families.scalar_ensemble import ScalarEnsembleConfig, ScalarEnsembleFamily

GAMMA, LAM = 0.9, 0.8
ALONE = {"consistency": 0.0, "shift": 0.0}


def ensemble(**settings) -> ScalarEnsembleFamily:
    return ScalarEnsembleFamily(ScalarEnsembleConfig(**settings))


def robust_bellman(**settings) -> RobustBellmanFamily:
    return RobustBellmanFamily(RobustBellmanConfig(**settings))


def batch(heads: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """old outputs and outputs (4, 7, N), rewards and mask (4, 7), with holes, an empty row and a padded tail."""
    g = torch.Generator().manual_seed(seed)
    old = torch.randn(4, 7, heads, generator=g)
    outputs = old + torch.randn(4, 7, heads, generator=g)
    rewards = torch.randn(4, 7, generator=g)
    mask = torch.ones(4, 7)
    mask[0, 2:4] = 0
    mask[1, 5:] = 0
    mask[2] = 0
    return old, outputs, rewards, mask


def update(family, old, outputs, rewards, mask):
    """One update's loss (28,) and gradient (28, N), by the calls that the worker makes."""
    targets = family.build_targets(family.keep(old), rewards, mask, gamma=GAMMA, lam=LAM)
    flat = {name: tensor.flatten(0, 1) for name, tensor in targets.items()}
    multipliers = family.multipliers(flat, mask.flatten())
    leaf = outputs.flatten(0, 1).clone().requires_grad_()
    loss = family.loss(leaf, flat, multipliers)
    (gradient,) = torch.autograd.grad((loss.total * mask.flatten()).sum(), leaf)
    return loss, gradient


@pytest.mark.parametrize(
    "family",
    [ensemble(num_heads=1, cliprange=0.3, coef=ALONE), robust_bellman(num_heads=1, cliprange=0.3)],
)
def test_one_head_and_nothing_else_is_the_scalar_critic_number_for_number(family):
    data = batch(1)
    loss, gradient = update(family, *data)
    expected, expected_gradient = update(ScalarFamily(ScalarConfig(cliprange=0.3)), *data)
    assert torch.equal(loss.total, expected.total)
    assert torch.equal(gradient, expected_gradient)
    assert torch.equal(family.values_from_kept(family.keep(data[0])), data[0].squeeze(-1))

    old, outputs, rewards, mask = data
    _, returns = compute_gae_advantage_return(rewards, old.squeeze(-1), mask, gamma=GAMMA, lam=LAM)
    verl_loss, _ = compute_value_loss(outputs.squeeze(-1), returns, old.squeeze(-1), mask, cliprange_value=0.3)
    mean = (loss.total * mask.flatten()).sum() / mask.sum()
    torch.testing.assert_close(mean, verl_loss, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["scalar_ensemble", "robust_bellman"])
def test_heads_share_one_return_and_are_clipped_around_themselves(kind):
    """Head by head verl's value loss on the return of the ensemble's value, in a loop; then the mean over heads."""
    robust = kind == "robust_bellman"
    family = robust_bellman(cliprange=0.3) if robust else ensemble(cliprange=0.3, coef=ALONE)
    old, outputs, rewards, mask = data = batch(3)
    value = old.min(-1).values if robust else old.mean(-1)
    _, returns = compute_gae_advantage_return(rewards, value, mask, gamma=GAMMA, lam=LAM)
    expected = sum(
        compute_value_loss(outputs[..., i], returns, old[..., i], mask, cliprange_value=0.3)[0] for i in range(3)
    )
    loss, _ = update(family, *data)
    mean = (loss.total * mask.flatten()).sum() / mask.sum()
    torch.testing.assert_close(mean, expected / 3, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(family.values_from_kept(family.keep(old)), value)
    torch.testing.assert_close(family.samples(old).squeeze(-1), value)


def test_consistency_and_shift_by_hand():
    family = ensemble(num_heads=3, cliprange=10.0, constraint="token", coef={"consistency": 0.5, "shift": 2.0})
    heads = torch.tensor([[0.0, 1.0, 5.0]])
    targets = {"values": heads, "returns": torch.tensor([[4.0]])}
    loss = family.loss(heads, targets)
    # squared error: (16 + 9 + 1)/3; consistency, over the three pairs: (1 + 25 + 16)/3 = 14; shift: relu(4 − 2) = 2.
    assert loss.terms["squared_error"].item() == pytest.approx(26 / 3)
    assert loss.terms["consistency"].item() == pytest.approx(14.0)
    assert loss.terms["shift"].item() == pytest.approx(2.0)
    assert loss.total.item() == pytest.approx(13 / 3 + 7 + 4)


def test_the_multiplier_of_shift_is_the_average_lag_over_valid_tokens():
    family = ensemble(num_heads=2, cliprange=10.0, coef={"consistency": 0.0, "shift": 1.0})
    values = torch.tensor([[0.0, 2.0], [1.0, 1.0], [9.0, 9.0]])
    targets = {"values": values, "returns": torch.tensor([[3.0], [1.0], [0.0]])}
    mask = torch.tensor([1, 1, 0])
    # Lags 3 − 1 = 2 and 1 − 1 = 0 over two valid tokens: μ = 1, and the term is 2·μ·(z − V).
    multipliers = family.multipliers(targets, mask)
    assert {name: value.item() for name, value in multipliers.items()} == {"shift": pytest.approx(1.0)}
    assert family.loss(values, targets, multipliers).terms["shift"].tolist() == pytest.approx([4.0, 0.0, -18.0])
    # Where the ensemble is ahead on average, nothing pushes.
    ahead = {**targets, "returns": torch.tensor([[0.0], [1.0], [50.0]])}
    assert family.multipliers(ahead, mask)["shift"].item() == 0.0
    with pytest.raises(ValueError, match="multipliers"):
        family.loss(values, targets)


def test_a_coefficient_of_zero_skips_the_term():
    family = ensemble(num_heads=3, coef=ALONE)
    data = batch(3)
    loss, _ = update(family, *data)
    assert set(loss.terms) == {"squared_error"}
    assert family.multipliers({"values": data[0].flatten(0, 1), "returns": torch.zeros(28, 1)}, data[3].flatten()) == {}


@pytest.mark.parametrize("kind", ["scalar_ensemble", "robust_bellman"])
def test_gradients_do_not_depend_on_how_the_tokens_are_cut(kind):
    family = robust_bellman() if kind == "robust_bellman" else ensemble()
    old, outputs, rewards, mask = batch(3)
    _, whole = update(family, old, outputs, rewards, mask)
    targets = family.build_targets(family.keep(old), rewards, mask, gamma=GAMMA, lam=LAM)
    flat = {name: tensor.flatten(0, 1) for name, tensor in targets.items()}
    multipliers = family.multipliers(flat, mask.flatten())
    leaf = outputs.flatten(0, 1).clone().requires_grad_()
    for piece in torch.arange(28).split(5):
        loss = family.loss(leaf[piece], {name: tensor[piece] for name, tensor in flat.items()}, multipliers)
        (loss.total * mask.flatten()[piece]).sum().backward()
    torch.testing.assert_close(leaf.grad, whole, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("scalar_ensemble", {"num_heads": 0}, "critic.value.num_heads is 0; it must be an integer >= 1"),
        ("robust_bellman", {"num_heads": 0}, "critic.value.num_heads is 0; it must be an integer >= 1"),
        ("scalar_ensemble", {"cliprange": -1.0}, "critic.value.cliprange is -1.0; it must be a number >= 0"),
        ("robust_bellman", {"cliprange": float("nan")}, "critic.value.cliprange is nan; it must be a number >= 0"),
        ("scalar_ensemble", {"coef": {"shift": -1.0}}, "critic.value.coef.shift is -1"),
        ("scalar_ensemble", {"coef": {"cvar": 0.1}}, "critic.value.coef has unknown terms cvar; allowed are"),
        ("scalar_ensemble", {"constraint": "none"}, "critic.value.constraint is 'none'; it must be one of batch"),
        (
            "robust_bellman",
            {"coef": {}},
            "critic.value.coef is no field of the family 'robust_bellman'; it has",
        ),
    ],
)
def test_bad_settings_are_named(family, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        family_config(family, **settings)
