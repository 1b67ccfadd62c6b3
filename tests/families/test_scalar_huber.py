# SPDX-License-Identifier: Apache-2.0
"""scalar with Huber's loss: against torch's own, against the squared error, and what it is robust to."""

import re

import pytest
import torch
from torch.nn import functional as F

from verl_dvpo.critic.config import family_config
from verl_dvpo.families.check import check_family
from verl_dvpo.families.scalar import ScalarConfig, ScalarFamily


def update(outputs, old, returns, *, cliprange: float, huber: float | None):
    family = ScalarFamily(ScalarConfig(cliprange=cliprange, huber=huber))
    leaf = outputs.clone().requires_grad_()
    loss = family.loss(leaf, {"returns": returns, "values": old})
    (gradient,) = torch.autograd.grad(loss.total.sum(), leaf)
    return loss, gradient


@pytest.mark.parametrize("kappa", [0.1, 0.7, 3.0])
def test_it_is_the_larger_of_torchs_huber_losses_of_the_plain_and_the_clipped_value(kappa):
    g = torch.Generator().manual_seed(0)
    old, returns = torch.randn(500, 1, generator=g), 2 * torch.randn(500, 1, generator=g)
    outputs = old + 0.5 * torch.randn(500, 1, generator=g)
    loss, gradient = update(outputs, old, returns, cliprange=0.3, huber=kappa)
    leaf = outputs.clone().requires_grad_()
    both = [
        F.huber_loss(value, returns, reduction="none", delta=kappa)
        for value in (leaf, old + (leaf - old).clamp(-0.3, 0.3))
    ]
    expected = torch.maximum(*both).squeeze(-1)
    torch.testing.assert_close(loss.total, expected.detach(), rtol=1e-5, atol=1e-6)
    (slope,) = torch.autograd.grad(expected.sum(), leaf)
    torch.testing.assert_close(gradient, slope, rtol=1e-4, atol=1e-5)
    assert loss.terms.keys() == {"huber"}


def test_a_kappa_beyond_every_error_is_the_squared_error_number_for_number():
    g = torch.Generator().manual_seed(1)
    old, outputs, returns = (torch.randn(50, 1, generator=g) for _ in range(3))
    (plain, slope), (wide, other) = (update(outputs, old, returns, cliprange=0.2, huber=huber) for huber in (None, 1e3))
    assert torch.equal(plain.total, wide.total)
    assert torch.equal(slope, other)
    assert plain.terms.keys() == {"squared_error"}


def test_no_error_has_no_gradient_and_an_outlier_one_of_kappa():
    values = torch.tensor([[1.0], [1.0]])
    loss, gradient = update(values, values, torch.tensor([[1.0], [-1e6]]), cliprange=0.5, huber=0.25)
    assert gradient.flatten().tolist() == [0.0, pytest.approx(0.25)]
    assert loss.total[0].item() == 0.0


def test_one_outlier_in_a_hundred_moves_the_mean_by_one_and_the_huber_centre_by_almost_nothing():
    """Rewards 0.4, 0.6, and one of 100: the mean is 1.494; with κ = 0.1 the two heaps hold the value between them."""
    rewards = torch.cat([torch.full((50, 1), 0.4), torch.full((49, 1), 0.6), torch.tensor([[100.0]])])
    found = {}
    for huber in (None, 0.1):
        value = torch.zeros(1, 1)
        for _ in range(300):
            _, slope = update(value.expand(100, 1), value.expand(100, 1), rewards, cliprange=1e9, huber=huber)
            value = value - 0.3 * slope.mean()
        found[huber] = value.item()
    assert found[None] == pytest.approx(1.494, abs=1e-3)
    # All are within κ of V or at its end: 50·(V − 0.4) = 49·(0.6 − V) + 0.1, so V = 49.5/99 = 0.5.
    assert found[0.1] == pytest.approx(0.5, abs=1e-3)


def test_it_passes_the_check_and_bad_settings_are_named():
    check_family(ScalarFamily(ScalarConfig(huber=0.5)))
    for bad in (0.0, -1.0, float("inf"), "wide"):
        with pytest.raises(ValueError, match=re.escape(f"critic.value.huber is {bad!r}; it must be a finite")):
            family_config("scalar", huber=bad)
