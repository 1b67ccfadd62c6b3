# SPDX-License-Identifier: Apache-2.0
"""Judges the contrasts of a study by the rule in its hypotheses file."""

import math
from enum import StrEnum
from typing import Any

import pandas as pd

from verl_dvpo.bench.statistics import holm, sign_flip_test
from verl_dvpo.bench.study.hypotheses import Contrast, Hypotheses
from verl_dvpo.bench.study.stopping import Standing, State


class Judgement(StrEnum):
    """The rule's verdict on a contrast."""

    SUPPORTED = "supported"
    CONTRADICTED = "contradicted"
    UNDECIDED = "undecided"
    OPEN = "open"


def contrasts_table(hypotheses: Hypotheses, standings: list[Standing]) -> pd.DataFrame:
    """Returns one row for each contrast, in the order of the hypotheses file.

    Columns: contrast, primary, sentence, treatment, control, noises, tasks, direction, expected, seeds (pairs),
    treatment_mean, control_mean, difference with ``_low`` and ``_high`` (95 % t interval over seeds), half_width,
    bound, state, p_value (two-sided, exact sign flips), p_corrected (Holm, over the primary contrasts; NaN for the
    others) and verdict. A primary contrast without a p-value counts in the correction as 1.
    """
    tests = [sign_flip_test(standing.differences) for standing in standings]
    primary = [place for place, standing in enumerate(standings) if standing.contrast.primary]
    corrected = [math.nan] * len(standings)
    for place, p_value in zip(primary, holm([tests[place] for place in primary]), strict=True):
        corrected[place] = p_value
    rows = [
        _row(hypotheses, standing, p_value, adjusted)
        for standing, p_value, adjusted in zip(standings, tests, corrected, strict=True)
    ]
    return pd.DataFrame(rows)


def judge(hypotheses: Hypotheses, standing: Standing, p_value: float) -> Judgement:
    """Returns what the rule of ``verdict`` says of a contrast.

    Args:
        hypotheses: with the rule.
        standing: of the contrast; an open one is not judged.
        p_value: of its test, corrected where it is primary; used with ``by: interval_and_test``.
    """
    if standing.state is State.OPEN:
        return Judgement.OPEN
    low, high = standing.estimate.low, standing.estimate.high
    rule = hypotheses.verdict
    passes = rule.by == "interval" or p_value <= rule.alpha
    if len(standing.seeds) < hypotheses.stopping.min_seeds or not passes or not (low > 0.0 or high < 0.0):
        return Judgement.UNDECIDED
    return Judgement.SUPPORTED if (low > 0.0) == (standing.contrast.direction == "higher") else Judgement.CONTRADICTED


def expectation(contrast: Contrast) -> str:
    """Returns what is expected of the difference, in symbols."""
    if contrast.expected is not None:
        return f"{contrast.expected:+.3f}"
    return "> 0" if contrast.direction == "higher" else "< 0"


def _row(hypotheses: Hypotheses, standing: Standing, p_value: float, corrected: float) -> dict[str, Any]:
    contrast, estimate = standing.contrast, standing.estimate
    number = len(standing.seeds)
    return {
        "contrast": contrast.name,
        "primary": contrast.primary,
        "sentence": contrast.sentence,
        "treatment": contrast.treatment,
        "control": contrast.control,
        "noises": " ".join(contrast.noises),
        "tasks": " ".join(contrast.tasks),
        "direction": contrast.direction,
        "expected": contrast.expected,
        "seeds": number,
        "treatment_mean": sum(standing.treatment) / number if number else math.nan,
        "control_mean": sum(standing.control) / number if number else math.nan,
        "difference": estimate.value,
        "difference_low": estimate.low,
        "difference_high": estimate.high,
        "half_width": standing.half_width,
        "bound": contrast.bound,
        "state": str(standing.state),
        "p_value": p_value,
        "p_corrected": corrected,
        "verdict": str(judge(hypotheses, standing, corrected if contrast.primary else p_value)),
    }
