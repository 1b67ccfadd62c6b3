# SPDX-License-Identifier: Apache-2.0
"""The automatic choices against loops over pairs of points, exact levels, and rules worked by hand."""

import math
from fractions import Fraction

import pytest
import torch

from verl_dvpo.distributional.automatic import AutoConfig, Chooser, nested_levels, weighted_crps
from verl_dvpo.distributional.levels import quantile_levels
from verl_dvpo.distributional.metrics import crps


def chooser(most=9, kind="midpoint", *, density=True, risk=0.0, temperature=1.0, **settings):
    config = AutoConfig(**{"sizes": (1, 3, most), "every": 1, "memory": 1.0, **settings})
    levels = quantile_levels(most, kind, dtype=torch.float64)
    return Chooser(levels, kind, temperature, config, density=density, risk=risk)


def equal(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("kind", ["midpoint", "right"])
@pytest.mark.parametrize(("size", "most"), [(1, 9), (3, 9), (9, 9), (7, 189), (63, 189), (5, 25)])
def test_a_smaller_numbers_levels_are_among_the_heads(kind, size, most):
    def level(j, m):
        return Fraction(j, m) if kind == "right" else Fraction(2 * j - 1, 2 * m)

    index = nested_levels(size, most, kind).tolist()
    assert [level(j + 1, most) for j in index] == [level(i + 1, size) for i in range(size)]


def test_right_levels_take_any_divisor_and_midpoints_an_odd_one():
    assert nested_levels(2, 4, "right").tolist() == [1, 3]
    config = AutoConfig(sizes=(50, 100))
    config.check_nested("right")
    with pytest.raises(ValueError, match=r"auto.sizes is \[50, 100\]; with levels 'midpoint' .* odd"):
        config.check_nested("midpoint")


def test_weighted_crps_is_the_energy_form_over_pairs():
    rng = torch.Generator().manual_seed(0)
    points = torch.randn(4, 5, generator=rng, dtype=torch.float64).sort(-1).values
    points[0, 2] = points[0, 1]  # a tie
    weights = torch.rand(5, generator=rng, dtype=torch.float64)
    weights /= weights.sum()
    returns = torch.tensor([points[0, 1], -9.0, 9.0, 0.1], dtype=torch.float64)
    for row, y, found in zip(points.tolist(), returns.tolist(), weighted_crps(points, weights, returns), strict=True):
        p = weights.tolist()
        to_return = sum(a * abs(x - y) for a, x in zip(p, row, strict=True))
        among = sum(a * b * abs(x - z) for a, x in zip(p, row, strict=True) for b, z in zip(p, row, strict=True))
        assert found.item() == pytest.approx(to_return - 0.5 * among, abs=1e-12)
    even = torch.full((5,), 0.2, dtype=torch.float64)
    torch.testing.assert_close(weighted_crps(points, even, returns), crps(points, returns))


def test_scores_of_each_candidate_by_hand():
    both = chooser(3, sizes=(1, 3), risk="auto", risks=(0.0, 1.0), temperature=0.5)
    assert both.names == ["crps_1", "error_1", "crps_3", "error_3", "risk_crps_0", "risk_crps_1"]
    points = torch.tensor([[0.0, 1.0, 5.0]], dtype=torch.float64)
    found = dict(
        zip(both.names, both.scores(points, torch.tensor([2.0], dtype=torch.float64))[0].tolist(), strict=True)
    )
    # One point, the middle one: |1 - 2| and its square. Three: mean 2, so no error.
    assert (found["crps_1"], found["error_1"], found["error_3"]) == (1.0, 1.0, 0.0)
    # E|X - 2| = (2 + 1 + 3)/3; half of E|X - X'| = (1 + 5 + 4)/9.
    assert found["crps_3"] == pytest.approx(2 - 10 / 9)
    assert found["risk_crps_0"] == pytest.approx(found["crps_3"])
    w = [math.exp(-tau / 0.5) for tau in (1 / 6, 1 / 2, 5 / 6)]
    p = [each / sum(w) for each in w]
    by_hand = 2 * p[0] + p[1] + 3 * p[2] - (p[0] * p[1] + 5 * p[0] * p[2] + 4 * p[1] * p[2])
    assert found["risk_crps_1"] == pytest.approx(by_hand)


def test_the_smallest_size_within_the_tolerance_of_both_scores():
    found = chooser(tolerance=0.1)
    assert found.size == 9  # nothing is known yet
    means = {"crps_1": 1.2, "error_1": 1.0, "crps_3": 1.05, "error_3": 1.05, "crps_9": 1.0, "error_9": 1.0}
    found.update(means)
    assert found.size == 3  # 1 has a CRPS beyond a tenth more
    found.update({**means, "error_3": 1.5})
    assert found.size == 9  # 3 has a mean error beyond it: (1.05 + 1.5)/2
    found.update({**means, "crps_1": 0.9, "error_1": 1.0, "error_3": 1.0})
    assert found.size == 1  # 1.2 + 1.2 + 0.9 against 1 + 1 + 1, exactly a tenth more
    for each in ("crps", "error"):
        loser = {**dict.fromkeys(found.names, 1.0), f"{each}_1": 2.0, f"{each}_3": 2.0}
        apart = chooser(tolerance=0.1)
        apart.update(loser)
        assert apart.size == 9, each


def test_two_best_candidates_that_rule_each_other_out_leave_all_levels():
    found = chooser(tolerance=0.0, sizes=(1, 3, 9))
    found.update({"crps_1": 1.0, "error_1": 2.0, "crps_3": 2.0, "error_3": 1.0, "crps_9": 3.0, "error_9": 3.0})
    assert found.size == 9


def test_the_leader_over_all_updates_is_followed_and_ties_go_to_the_smaller_risk():
    found = chooser(density=False, risk="auto", risks=(0.0, 0.1, 0.5))

    def see(*losses):
        found.update(dict(zip(("risk_crps_0", "risk_crps_0.1", "risk_crps_0.5"), losses, strict=True)))
        return found.risk

    assert see(1.0, 1.0, 1.0) == 0.0
    assert see(1.0, 0.5, 0.75) == 0.1
    assert see(1.0, 1.0, 0.25) == 0.5  # 3, 2.5, 2: the sum leads, not the last
    assert see(0.0, 1.0, 1.5) == 0.0  # 3, 3.5, 3.5
    assert see(math.nan, 0.0, 0.0) == 0.0  # nothing is learned from a score that is no number
    assert found.updates == 4


def test_an_old_update_weighs_less_and_choices_come_at_their_time():
    found = chooser(density=False, risk="auto", risks=(0.0, 0.1), memory=0.5, every=2)
    found.update({"risk_crps_0": 4.0, "risk_crps_0.1": 0.0})
    assert found.risk == 0.0  # not yet
    found.update({"risk_crps_0": 0.0, "risk_crps_0.1": 1.0})
    assert found.losses == {"risk_crps_0": 2.0, "risk_crps_0.1": 1.0}
    assert found.risk == 0.1


def test_a_saved_and_loaded_chooser_chooses_the_same_next():
    first, second = (chooser(risk="auto", risks=(0.0, 0.1), every=3, memory=0.7) for _ in range(2))
    rng = torch.Generator().manual_seed(1)
    updates = [dict(zip(first.names, torch.rand(8, generator=rng).tolist(), strict=True)) for _ in range(30)]
    for each in updates[:16]:
        first.update(each)
    second.load_state(first.state())
    choices = []
    for each in updates[16:]:
        first.update(each)
        second.update(each)
        assert equal(first.state(), second.state())
        choices.append((first.size, first.risk))
    assert len(set(choices)) > 1
    with pytest.raises(ValueError, match=r"auto has the levels \[3, 9\] .* it has the levels \[1, 3, 9\]"):
        chooser(sizes=(3, 9), risk="auto", risks=(0.0, 0.1)).load_state(first.state())
    with pytest.raises(ValueError, match="there is none; resume with the settings"):
        second.load_state({})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sizes": (3,)}, r"auto.sizes is \[3\]; it must have at least 2 numbers"),
        ({"sizes": (3, 10)}, "auto.sizes is .* each must divide the last"),
        ({"sizes": (0, 10)}, "auto.sizes is .* integers >= 1"),
        ({"sizes": "7"}, "auto.sizes is '7'; it must be a list"),
        ({"risks": (0.5, 0.1)}, "auto.risks is .* ascending"),
        ({"risks": (0.5, 1.5)}, r"auto.risks is .* in \[0, 1\]"),
        ({"tolerance": -0.1}, "auto.tolerance is -0.1"),
        ({"memory": 1.1}, "auto.memory is 1.1"),
        ({"every": 0}, "auto.every is 0"),
    ],
)
def test_settings_outside_their_bounds_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AutoConfig(**settings)
