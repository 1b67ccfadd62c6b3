# SPDX-License-Identifier: Apache-2.0
"""What the figures draw, read back from matplotlib's own objects, and which answers are chosen."""

import dataclasses
import io

import numpy as np
import pytest
from pictures import made
from PIL import Image

from verl_dvpo.pictures.calibration import tokens_of
from verl_dvpo.pictures.choose import choose_answers, fall, rise
from verl_dvpo.pictures.curves import Curve
from verl_dvpo.pictures.fan import fan_figure, label, turn
from verl_dvpo.pictures.figure import to_png
from verl_dvpo.pictures.figures import calibration_figure, curves_figure
from verl_dvpo.saved.values import LEVELS, Dump


def shown(answer):
    return choose_answers([Dump(3, (answer,))], 1)


def axes_of(figure):
    return [axis for part in figure.subfigs for axis in part.axes]


def test_the_fan_draws_the_answers_own_numbers():
    answer = made.falling(9, 5)
    fan, heads, advantages = axes_of(fan_figure(shown(answer)))
    lines = {line.get_label(): line for line in fan.lines}
    assert lines["median"].get_ydata().tolist() == pytest.approx(answer.quantiles[:, 5].tolist())
    assert lines["value (mean)"].get_ydata().tolist() == pytest.approx(answer.values.tolist())
    assert lines["return that came"].get_xdata().tolist() == list(range(10))
    for band, low, high in zip(fan.collections, (0.05, 0.25), (0.95, 0.75), strict=True):
        (path,) = band.get_paths()
        corners = {(round(x, 6), round(y, 6)) for x, y in path.vertices}
        for state in range(9):
            ends = answer.quantiles[state, [LEVELS.index(low), LEVELS.index(high)]]
            assert {(float(state), round(float(end), 6)) for end in ends} <= corners
    assert [bar.get_height() for bar in advantages.patches] == pytest.approx(answer.advantages.tolist())
    assert [bar.get_x() + bar.get_width() / 2 for bar in advantages.patches] == pytest.approx(np.arange(9) + 0.5)
    first, second = heads.lines[1:]
    assert second.get_ydata() - first.get_ydata() == pytest.approx(np.full(9, 0.01))
    assert [text.get_text() for text in advantages.get_xticklabels()] == list(answer.pieces)


def test_the_token_that_moves_the_median_most_is_marked():
    answer = made.falling(9, 5)
    assert turn(answer) == (5, 0.5, 0.0)  # the state before token 5 is the last of the higher ones
    (fan, *_) = axes_of(fan_figure(shown(answer)))
    assert [text.get_text() for text in fan.texts] == ["“f”: median 0.50 → 0.00"]
    assert turn(made.answer(1.0)) is None
    assert turn(made.answer(1.0, 1)) is None


def test_tokens_of_a_tool_break_the_lines_and_carry_no_advantage():
    answer = made.answer(1.0, 5, mask=[1, 0, 0, 1, 1])
    fan, _, advantages = axes_of(fan_figure(shown(answer)))
    drawn = next(line for line in fan.lines if line.get_label() == "median").get_ydata()
    assert np.isnan(drawn).tolist() == [False, True, True, False, False]
    assert [bar.get_height() for bar in advantages.patches[:5]][1:3] == [0.0, 0.0]
    grey = [patch for patch in fan.patches if patch.get_x() in (1.0, 2.0)]
    assert len(grey) == 2


def test_a_scalar_critic_is_one_line_without_bands_and_heads():
    line = made.answer(1.0, quantiles=np.full(11, 0.5), heads=1)
    fan, advantages = axes_of(fan_figure(shown(line)))
    assert not fan.collections
    assert {each.get_label() for each in fan.lines} >= {"value (this critic has no distribution)", "return that came"}
    assert "median" not in {each.get_label() for each in fan.lines}
    assert len(advantages.patches) == 4


def test_dollars_blanks_and_long_answers_do_not_break_a_figure():
    odd = made.answer(1.0, 4, pieces=("$x^", "\n", " ", ""), prompt="$a_$")
    assert [label(odd, token) for token in range(4)] == ["$x^", "⏎", "␣", "∅"]
    long = dataclasses.replace(made.answer(1.0, 200), pieces=())
    assert label(long, 7) == "7"
    figure = fan_figure([*shown(odd), *shown(long)])
    assert "number" in axes_of(figure)[-1].get_xlabel()
    with Image.open(io.BytesIO(to_png(figure))) as image:
        assert image.width > 700


def test_equal_numbers_give_equal_bytes():
    assert to_png(fan_figure(shown(made.answer(1.0)))) == to_png(fan_figure(shown(made.answer(1.0))))


def test_a_right_and_a_wrong_answer_come_first_and_then_what_nobody_looked_for():
    early, late = made.falling(6, 1), made.falling(6, 3)
    steady = made.answer(0.0, 6)
    dumps = [Dump(5, (made.answer(1.0), early)), Dump(10, (steady, made.answer(1.0, 6))), Dump(15, (late,))]
    found = choose_answers(dumps, 4)
    assert [(each.step, each.answer.reward) for each in found[:2]] == [(10, 1.0), (15, 0.0)]
    assert found[1].answer is late  # of the later half, where a steady one fell less
    assert "lowest reward" in found[1].why
    assert [each.step for each in found[2:]] == [10, 5]
    assert all("number 1" in each.why for each in found[2:])
    assert (fall(late), rise(late)) == (0.5, 0.0)
    assert len(choose_answers(dumps, 1)) == 1


def test_equal_rewards_and_empty_files():
    same = Dump(1, (made.answer(0.0), made.answer(0.0)))
    rule = "of those that were written in this step"
    assert [each.why for each in choose_answers([same], 4)] == [f"number 1 {rule}", f"number 2 {rule}"]
    assert choose_answers([Dump(1, ()), Dump(2, (made.answer(1.0, 2, mask=[0, 0]),))], 4) == []


def test_calibration_draws_the_measured_shares():
    tokens = tokens_of([made.answer(reward, 1) for reward in (0.3, 0.25, -1.0, 2.0)])
    pit, coverage, _, _ = calibration_figure(tokens).axes
    heights = [patch.get_height() for patch in pit.patches if hasattr(patch, "get_height")]
    assert heights == pytest.approx([0.25, 0, 0.125, 0.375, 0, 0, 0, 0, 0, 0, 0.25])
    assert coverage.lines[1].get_ydata().tolist() == pytest.approx([0, 0, 0.5, 0.5, 0.5])
    scalar = tokens_of([made.answer(1.0, quantiles=np.full(11, 0.5))])
    assert [axis.get_title() for axis in calibration_figure(scalar).axes] == [
        "returns where the value was about the same",
        "bias by position",
    ]


def test_curves_have_a_band_for_a_group_and_none_for_a_single_run():
    steps = np.arange(3)
    group = Curve("dvpo", "score", 3, steps, steps * 0.1, steps * 0.1 - 0.01, steps * 0.1 + 0.01)
    alone = Curve("ppo", "score", 1, steps, steps * 0.2, steps * np.nan, steps * np.nan)
    figure = curves_figure({"score": [group, alone], "reward": [group], "spread": [alone]})
    assert [len(axis.collections) for axis in figure.axes] == [1, 1, 0, 0]
    once = Curve("dvpo", "score", 3, steps[:1], np.array([0.5]), np.array([0.4]), np.array([0.7]))
    (bar,) = curves_figure({"score": [once]}).axes[0].collections
    assert bar.get_segments()[0].tolist() == pytest.approx(np.array([[0.0, 0.4], [0.0, 0.7]]))
    assert [axis.get_visible() for axis in figure.axes] == [True, True, True, False]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dvpo (3 runs)", "ppo (1 run)"]
