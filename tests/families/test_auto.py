# SPDX-License-Identifier: Apache-2.0
"""The quantile ensemble with ``num_quantiles: auto`` and ``coef.risk: auto``, against loops and plain ensembles."""

import pytest
import torch

from verl_dvpo.distributional.metrics import crps
from verl_dvpo.families.check import check_family
from verl_dvpo.families.registry import build_family, family_settings

CALIBRATED = {"levels": "midpoint", "kappa": 0.0, "target": "sample_replacement", "constraint_statistics": "level"}


def family(**settings):
    auto = {"sizes": [3, 9], "every": 1, **settings.pop("auto", {})}
    return build_family(family_settings("quantile_ensemble", num_heads=2, **{"auto": auto, **settings}))


def chosen(size, **settings):
    """A family that has chosen ``size`` of its 9 levels."""
    found = family(num_quantiles="auto", **settings)
    found.load_state({**found.state(), "size": torch.tensor(size)})
    return found


@pytest.mark.parametrize("settings", [{}, CALIBRATED], ids=["dvpo", "calibrated"])
@pytest.mark.parametrize("size", [3, 9])
def test_the_interface_holds_whatever_is_chosen(settings, size):
    check_family(chosen(size, **settings))


@pytest.mark.parametrize("kind", ["midpoint", "right"])
def test_what_is_chosen_reads_as_a_smaller_critic_of_the_same_quantiles(kind):
    outputs = torch.randn(4, 18, generator=torch.Generator().manual_seed(0))
    few = chosen(3, levels=kind)
    index = [1, 4, 7] if kind == "midpoint" else [2, 5, 8]
    ascending = outputs.unflatten(-1, (2, 9)).mean(-2).sort(-1).values
    torch.testing.assert_close(few.samples(outputs), ascending[:, index])
    torch.testing.assert_close(few.value(outputs), ascending[:, index].mean(-1))
    torch.testing.assert_close(few.keep(outputs), ascending)
    heads = outputs.unflatten(-1, (2, 9)).sort(-1).values[..., index].mean(-1)
    torch.testing.assert_close(few.head_values(outputs), heads)


def test_targets_rest_on_what_is_chosen_and_every_level_learns():
    few = chosen(3, levels="midpoint", kappa=0.0)
    outputs = torch.randn(1, 2, 18, generator=torch.Generator().manual_seed(0))
    kept = few.keep(outputs)
    rewards, mask = torch.tensor([[0.0, 1.0]]), torch.ones(1, 2)
    targets = few.build_targets(kept, rewards, mask, gamma=0.5, lam=0.0)
    torch.testing.assert_close(targets["targets"][0, 0], 0.5 * kept[0, 1, [1, 4, 7]])
    flat = {name: tensor.flatten(0, 1) for name, tensor in targets.items()}
    leaf = outputs.flatten(0, 1).requires_grad_()
    few.loss(leaf, flat, few.multipliers(flat, mask.flatten())).total.sum().backward()
    assert (leaf.grad != 0).all()


def test_scores_are_those_of_realised_returns_over_valid_tokens():
    """The return of a state is the discounted sum of the valid rewards from there, whatever the critic says."""
    both = family(num_quantiles="auto", risk_form="readout", coef={"risk": "auto"}, auto={"risks": [0.0, 0.5]})
    kept = both.keep(torch.randn(2, 4, 18, generator=torch.Generator().manual_seed(3)))
    rewards = torch.tensor([[0.5, 9.0, 0.0, 2.0], [1.0, 0.0, 7.0, 7.0]])
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0]])
    targets = both.build_targets(kept, rewards, mask, gamma=0.9, lam=0.3)
    found = both.target_statistics({name: tensor.flatten(0, 1) for name, tensor in targets.items()})
    names = ["crps_3", "error_3", "crps_9", "error_9", "risk_crps_0", "risk_crps_0.5"]
    assert list(found) == [f"auto/{name}" for name in names]
    returns = {(0, 0): 0.5 + 0.81 * 2.0, (0, 2): 0.9 * 2.0, (0, 3): 2.0, (1, 0): 1.0, (1, 1): 0.0}
    for (row, column), value in returns.items():
        expected = crps(kept[row, column], torch.tensor(value))
        torch.testing.assert_close(found["auto/crps_9"].view(2, 4)[row, column], expected, atol=1e-5, rtol=0)
        error = (kept[row, column, [2, 5, 8]].mean() - value) ** 2
        torch.testing.assert_close(found["auto/error_3"].view(2, 4)[row, column], error, atol=1e-4, rtol=1e-4)


def test_a_choice_changes_the_value_and_survives_a_state():
    both = family(num_quantiles="auto", risk_form="readout", coef={"risk": "auto"}, auto={"risks": [0.0, 0.5]})
    outputs = torch.randn(4, 18, generator=torch.Generator().manual_seed(0))
    before = both.value(outputs)
    torch.testing.assert_close(before, outputs.mean(-1))
    scores = dict.fromkeys((f"auto/{name}" for name in both.chooser.names), 1.0)
    assert both.adapt({**scores, "auto/risk_crps_0.5": 0.5}) == {"auto/num_quantiles": 3.0, "auto/risk": 0.5}
    fixed = chosen(3, risk_form="readout", coef={"risk": 0.5})
    torch.testing.assert_close(both.value(outputs), fixed.value(outputs))
    assert (both.value(outputs) - before).abs().max() > 1e-3
    other = family(num_quantiles="auto", risk_form="readout", coef={"risk": "auto"}, auto={"risks": [0.0, 0.5]})
    other.load_state(both.state())
    torch.testing.assert_close(other.value(outputs), both.value(outputs), rtol=0, atol=0)


def test_without_auto_there_is_nothing_to_choose():
    plain = family(num_quantiles=9)
    assert (plain.state(), plain.adapt({}), plain.target_statistics({})) == ({}, {}, {})
    with pytest.raises(ValueError, match="keeps no state"):
        plain.load_state(family(num_quantiles="auto").state())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_quantiles": "many"}, "num_quantiles is 'many'; it must be an integer >= 1, or 'auto'"),
        ({"coef": {"risk": "auto"}}, "coef.risk is 'auto', but risk_form is 'separable'"),
        ({"auto": {"size": 3}}, "auto has unknown fields size"),
        ({"num_quantiles": "auto", "levels": "midpoint", "auto": {"sizes": [2, 4]}}, "auto.sizes is .* odd number"),
        ({"coef": {"cvar": "auto"}}, "coef.cvar is 'auto'"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        family_settings("quantile_ensemble", **settings)
