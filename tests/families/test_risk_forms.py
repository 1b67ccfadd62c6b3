# SPDX-License-Identifier: Apache-2.0
"""Eq 4 in its two forms: ``separable`` moves no minimiser, ``readout`` moves the value by a known amount."""

import math
import re

import pytest
import torch
from verl.trainer.ppo.core_algos import compute_gae_advantage_return

from verl_dvpo.critic.config import family_config
from verl_dvpo.distributional import TERMS, DVPOLossConfig, dvpo_loss, quantile_levels
from verl_dvpo.families.check import check_family
from verl_dvpo.families.quantile_ensemble import QuantileEnsembleConfig, QuantileEnsembleFamily

SWEEP = (0.0, 0.05, 0.1, 0.2, 1.0)


def critic(risk: float, form: str = "readout", **settings) -> QuantileEnsembleFamily:
    coef = dict.fromkeys(TERMS, 0.0) | {"risk": risk}
    given = {"num_heads": 2, "num_quantiles": 200, "levels": "midpoint", "kappa": 0.0, "coef": coef, **settings}
    return QuantileEnsembleFamily(QuantileEnsembleConfig(risk_form=form, **given))


def minimiser(form: str, risk: float, z: torch.Tensor, *, kappa: float) -> torch.Tensor:
    """Descends the whole loss of one head of 10 quantiles on samples z, each level by its own step."""
    levels = quantile_levels(10, dtype=torch.float64)
    config = DVPOLossConfig(
        kappa=kappa, risk_form=form, risk_temperature=0.3, coef=dict.fromkeys(TERMS, 0.0) | {"risk": risk}
    )
    theta = torch.zeros(1, 10, dtype=torch.float64, requires_grad=True)
    for _ in range(600):
        (slope,) = torch.autograd.grad(10 * dvpo_loss(theta, z, levels, config).total, theta)
        theta = (theta - 0.4 * slope).detach().requires_grad_()
    return theta.detach()[0]


@pytest.mark.parametrize("form", ["separable", "readout"])
def test_no_form_moves_a_minimiser_of_the_loss(form):
    """With κ = 1 and targets within 1 of each other the minima are expectiles, smooth and unique."""
    z = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = minimiser(form, 0.0, z, kappa=1.0)
    assert plain.diff().min() > 0.01
    for risk in (0.2, 1.0):
        torch.testing.assert_close(minimiser(form, risk, z, kappa=1.0), plain, rtol=0, atol=1e-6)


def test_the_separable_form_moves_no_value_and_the_readout_moves_it_by_what_the_integral_says():
    """Quantiles of U(0, 1): ∫τ·exp(−τ)dτ / ∫exp(−τ)dτ over (0, 1) is (1 − 2/e)/(1 − 1/e), in place of ½."""
    tau = (torch.arange(200) + 0.5) / 200
    outputs = torch.stack([tau.flip(0) - 0.1, tau.flip(0) + 0.1]).flatten()[None]  # heads apart, out of order
    averse = (1 - 2 / math.e) / (1 - 1 / math.e)
    for risk in SWEEP:
        assert critic(risk, "separable").value(outputs).item() == pytest.approx(0.5, abs=1e-6)
        found = critic(risk)
        expected = (1 - risk) * 0.5 + risk * averse
        assert found.value(outputs).item() == pytest.approx(expected, abs=1e-5)
        assert found.values_from_kept(found.keep(outputs)).item() == pytest.approx(expected, abs=1e-5)
        heads = found.head_values(outputs)
        assert heads[0].tolist() == pytest.approx([expected - 0.1, expected + 0.1], abs=1e-5)


def test_a_small_temperature_reads_the_lowest_quantile():
    outputs = torch.tensor([[3.0, 1.0, 2.0, 7.0]])
    family = critic(1.0, num_heads=1, num_quantiles=4, risk_temperature=1e-3)
    assert family.value(outputs).item() == pytest.approx(1.0)


def test_the_readout_leaves_loss_gradient_and_targets_as_they_are_without_risk():
    g = torch.Generator().manual_seed(1)
    outputs, kept = torch.randn(12, 400, generator=g), torch.randn(3, 4, 200, generator=g).sort(-1).values
    rewards, mask = torch.randn(3, 4, generator=g), torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    found = []
    for family in (critic(0.2), critic(0.0)):
        built = family.build_targets(kept, rewards, mask, gamma=0.9, lam=0.8)
        leaf = outputs.clone().requires_grad_()
        loss = family.loss(leaf, {name: tensor.flatten(0, 1) for name, tensor in built.items()})
        assert loss.terms.keys() == {"quantile"}
        (gradient,) = torch.autograd.grad(loss.total.sum(), leaf)
        found.append((built["targets"], loss.total.detach(), gradient))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_actors_advantage_moves_with_the_risk_weight_and_is_the_mean_of_the_quantiles_gae():
    """Weights that sum to 1 commute with GAE: verl's own on each quantile, weighted, is that of the weighted value."""
    g = torch.Generator().manual_seed(2)
    kept = torch.randn(3, 5, 200, generator=g).sort(-1).values
    rewards, mask = torch.zeros(3, 5), torch.ones(3, 5)
    rewards[:, -1] = torch.rand(3, generator=g)

    def advantages(values: torch.Tensor) -> torch.Tensor:  # verl's, before it whitens them
        return compute_gae_advantage_return(rewards, values, mask, 0.9, 0.8)[1] - values

    each = [advantages(quantile) for quantile in kept.unbind(-1)]
    plain = torch.stack(each).mean(0)
    levels = (torch.arange(200) + 0.5) / 200
    raw = torch.exp(-levels / 0.5)
    for risk in SWEEP:
        values = critic(risk, risk_temperature=0.5).values_from_kept(kept)
        weights = (1 - risk) / 200 + risk * raw / raw.sum()
        expected = (torch.stack(each) * weights[:, None, None]).sum(0)
        found = advantages(values)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        moved = (found - plain).abs().mean().item()
        assert moved < 1e-6 if risk == 0 else moved > 0.1 * risk


@pytest.mark.parametrize("form", ["separable", "readout"])
def test_both_forms_pass_the_check_of_a_family(form):
    check_family(critic(0.3, form))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"risk_form": "cvar"}, "critic.value.risk_form is 'cvar'; it must be one of separable, readout"),
        ({"risk_form": "readout", "coef": {"risk": 1.5}}, "critic.value.coef.risk is 1.5, but risk_form is 'readout'"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        family_config("quantile_ensemble", **settings)
