# SPDX-License-Identifier: Apache-2.0
"""Verdicts and corrected p-values against numbers that are worked out by hand."""

import math

import pytest
from fake import study_of
from registered import contrast_of, ended, hypotheses_of, registered

from verl_dvpo.bench.study.contrasts import contrasts_table, expectation
from verl_dvpo.bench.study.forest import forest
from verl_dvpo.bench.study.plan import plan
from verl_dvpo.bench.study.stopping import standings

ARMS = ["ppo", "dvpo", "grpo", "dfpo"]


def table_of(out, differences, *contrasts, verdict=None, seeds=6, **stopping):
    """The table of a study in which each algorithm differs from ppo by the given numbers, one a seed."""
    hypotheses = hypotheses_of(*contrasts, **stopping) | {"verdict": verdict or {"by": "interval"}}
    study = study_of(out, algorithms=ARMS, seeds=list(range(10)), hypotheses=hypotheses)

    def of(run):
        return 0.5 + 0.01 * run.seed + differences.get(run.algorithm.name, [0.0] * 10)[run.seed]

    records = {run.name: ended(of(run)) if run.seed < seeds else None for run in plan(study)}
    return contrasts_table(study.hypotheses, standings(study, records))


UP = [0.10, 0.12, 0.08, 0.11, 0.09, 0.10, 0.10, 0.10]
DOWN = [-d for d in UP]
MIXED = [0.10, -0.12, 0.08, -0.11, 0.09, -0.10, 0.1, -0.1]


def test_verdicts_follow_the_interval_and_the_direction(out):
    table = table_of(
        out,
        {"dvpo": UP, "grpo": DOWN, "dfpo": MIXED},
        contrast_of(name="up"),
        contrast_of(name="down", treatment="grpo"),
        contrast_of(name="down_expected", treatment="grpo", direction="lower"),
        contrast_of(name="mixed", treatment="dfpo"),
        contrast_of(name="up_unexpected", direction="lower"),
        max_seeds=6,
    )
    assert list(table["verdict"]) == ["supported", "contradicted", "supported", "undecided", "contradicted"]
    # half-widths t(0.975, n - 1) s / sqrt(n): 4.303 * 0.0200 / 1.732 = 0.050, then 0.027, then 2.776 * 0.0158 / 2.236
    assert (table.loc[0, "seeds"], table.loc[0, "half_width"]) == (5, pytest.approx(0.0196, abs=1e-4))
    assert table.loc[0, "difference"] == pytest.approx(0.1)
    assert table.loc[0, "treatment_mean"] - table.loc[0, "control_mean"] == pytest.approx(0.1)


def test_corrected_p_values_are_holms_over_the_primary_contrasts_only(out):
    """Of eight pairs all but a tiny one are positive: 4 of 256 patterns are as far out, so p = 1/64."""
    almost = [*UP[:7], -0.001]
    table = table_of(
        out,
        {"dvpo": almost, "grpo": [-d for d in almost], "dfpo": MIXED},
        contrast_of(name="up", bound=0.001),
        contrast_of(name="mixed", treatment="dfpo", bound=0.001),
        contrast_of(name="down", treatment="grpo", bound=0.001, primary=False),
        verdict={"by": "interval_and_test", "alpha": 0.02},
        seeds=8,
        max_seeds=8,
    )
    assert table["p_value"][[0, 2]].tolist() == pytest.approx([1 / 64, 1 / 64])
    assert table.loc[0, "p_corrected"] == pytest.approx(2 / 64)  # the smaller of two primaries
    assert table.loc[1, "p_corrected"] == pytest.approx(table.loc[1, "p_value"])
    assert math.isnan(table.loc[2, "p_corrected"])
    assert (table["difference_low"][0] > 0, table["difference_high"][2] < 0) == (True, True)
    # corrected 0.031 is above 0.02; the exploratory one is judged by its own 0.016
    assert list(table["verdict"]) == ["undecided", "undecided", "contradicted"]


def test_an_open_contrast_has_numbers_and_no_verdict(out):
    table = table_of(out, {"dvpo": UP}, contrast_of(bound=0.001), seeds=4)
    assert (table.loc[0, "seeds"], table.loc[0, "state"], table.loc[0, "verdict"]) == (4, "open", "open")
    assert table.loc[0, "difference_low"] > 0


def test_a_budget_that_ends_before_the_least_number_of_seeds_decides_nothing(out):
    table = table_of(out, {"dvpo": UP}, contrast_of(bound=0.5), seeds=2, budget_hours=0.01)
    assert (table.loc[0, "seeds"], table.loc[0, "state"], table.loc[0, "verdict"]) == (2, "budget", "undecided")


def test_what_is_expected_in_symbols(out):
    study = registered(
        out,
        contrast_of(),
        contrast_of(name="b", direction="lower"),
        contrast_of(name="c", expected=0.05),
        contrast_of(name="d", direction="lower", expected=-0.05),
    )
    assert [expectation(contrast) for contrast in study.hypotheses.contrasts] == ["> 0", "< 0", "+0.050", "-0.050"]


def test_the_forest_has_primary_contrasts_first_and_every_interval(out):
    table = table_of(
        out,
        {"dvpo": UP, "grpo": DOWN},
        contrast_of(name="second", treatment="grpo", primary=False),
        contrast_of(name="first", expected=0.3),
        max_seeds=6,
    )
    figure = forest(table)
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["first (n = 5)", "second (n = 5)"]
    ends = [segment[:, 0] for bar in axis.collections for segment in bar.get_segments()]
    assert ends[0] == pytest.approx(table.loc[1, ["difference_low", "difference_high"]].astype(float))
    assert axis.get_xlim()[1] > 0.3
    assert forest(table.assign(seeds=0)) is None
