# SPDX-License-Identifier: Apache-2.0
"""Reads curves of metrics from runs, and averages those of a group with Student's t intervals.

Shape legend: R runs of a group, S steps that all of them have.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from verl_dvpo.pictures.calibration import CONFIDENCE
from verl_dvpo.records import read_metrics, scores

#: Title and unit of each panel -> the metric of verl's that it shows.
METRICS = {
    ("training reward", "reward"): "critic/score/mean",
    ("explained variance of the returns", "share, at most 1"): "critic/vf_explained_var",
    ("spread of the distributions", "standard deviation (reward)"): "critic/quantile/spread",
    ("disagreement of the heads", "standard deviation (reward)"): "critic/ensemble/std",
}
SCORE = ("validation score", "score")

Array = NDArray[Any]


@dataclass(frozen=True)
class Curve:
    """A metric over training, averaged over the runs of a group.

    Attributes:
        group: its name.
        unit: of the numbers.
        runs: R.
        steps: (S,).
        mean: (S,).
        low: (S,) lower end of the 95 % interval; NaN for one run.
        high: (S,) upper end.
    """

    group: str
    unit: str
    runs: int
    steps: Array
    mean: Array
    low: Array
    high: Array


def metrics_file(run: Path) -> Path:
    """Returns the file of a run's metrics, in its folder or beside its checkpoints."""
    places = [place / "metrics.jsonl" for place in (run, run.parent)]
    return next((place for place in places if place.is_file()), places[0])


def curves(groups: Mapping[str, Sequence[Path]]) -> dict[str, list[Curve]]:
    """Returns title -> curves of the groups that have the metric; without titles that no group has.

    Args:
        groups: name -> folders of runs.
    """
    series = {name: [_series(run) for run in runs] for name, runs in groups.items()}
    found: dict[str, list[Curve]] = {}
    for title, unit in (SCORE, *METRICS):
        mine = [
            curve
            for name, runs in series.items()
            if (curve := _average(name, unit, [run[title] for run in runs if title in run])) is not None
        ]
        if mine:
            found[title] = mine
    return found


def t_band(values: Array) -> tuple[Array, Array]:
    """(R, S) -> ends (S,) of Student's 95 % intervals of the means; NaN for one run."""
    from scipy import stats

    runs = len(values)
    if runs < 2:
        return (np.full(values.shape[1], np.nan),) * 2
    reach = stats.t.ppf(0.5 + CONFIDENCE / 2, runs - 1) * values.std(0, ddof=1) / np.sqrt(runs)
    return values.mean(0) - reach, values.mean(0) + reach


def _series(run: Path) -> dict[str, dict[int, float]]:
    """Returns title -> step -> number of one run; steps where the number is not finite are left out."""
    found: dict[str, dict[int, float]] = {}
    for record in read_metrics(metrics_file(run)):
        numbers = {title: record["data"].get(metric) for (title, _), metric in METRICS.items()}
        if validation := scores(record):
            numbers[SCORE[0]] = sum(validation.values()) / len(validation)
        for title, number in numbers.items():
            if isinstance(number, int | float) and np.isfinite(number):
                found.setdefault(title, {})[int(record["step"])] = float(number)
    return found


def _average(group: str, unit: str, runs: Sequence[Mapping[int, float]]) -> Curve | None:
    steps = sorted(set.intersection(*(set(run) for run in runs))) if runs else []
    if not steps:
        return None
    values = np.array([[run[step] for step in steps] for run in runs])
    low, high = t_band(values)
    return Curve(group, unit, len(runs), np.array(steps), values.mean(0), low, high)
