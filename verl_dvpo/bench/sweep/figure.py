# SPDX-License-Identifier: Apache-2.0
"""Draws the last scores of a sweep over what was swept.

One field is drawn along an axis, two fields of a full grid as lines of one along the other. Where a search has chosen
points of its own, each field has a panel with all runs.
"""

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from verl_dvpo.bench.sweep.read import SweptRun, Value, shown
from verl_dvpo.pictures.figure import new_figure
from verl_dvpo.pictures.palette import BLUE, COLOURS, LINES, MARKERS, RED

SCORE = "last validation score"
#: More values of a field than these are drawn to scale, fewer side by side.
TICKS = 12
#: Panels in a row, and at most; further fields are in the table alone.
COLUMNS, PANELS = 3, 9


def scores_figure(runs: Sequence[SweptRun]) -> Any:
    """Returns the figure of a sweep.

    Args:
        runs: that have a score; all with the same fields.
    """
    fields = list(runs[0].point)
    if len(fields) <= 1 and len(_values(runs, fields[0]) if fields else ()) <= TICKS:
        return _lines(runs, fields[0] if fields else None, None)
    if len(fields) == 2 and _is_grid(runs, fields):
        along, by = sorted(fields, key=lambda field: -len(_values(runs, field)))
        return _lines(runs, along, by)
    return _panels(runs, fields[:PANELS])


def to_svg(figure: Any) -> str:
    """Returns a figure as SVG; equal figures give equal text."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "verl-dvpo"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def _values(runs: Sequence[SweptRun], field: str) -> list[Value]:
    """Lists the values of a field: numbers by size, then words."""
    found = {run.point[field] for run in runs}
    return sorted(found, key=lambda value: (isinstance(value, str), value))


def _is_grid(runs: Sequence[SweptRun], fields: Sequence[str]) -> bool:
    counts = [len(_values(runs, field)) for field in fields]
    points = {tuple(run.point.items()) for run in runs}
    return len(points) == math.prod(counts) and max(counts) <= TICKS and min(counts) <= len(COLOURS)


def _lines(runs: Sequence[SweptRun], along: str | None, by: str | None) -> Any:
    """Draws means as lines, standard deviations as bars and runs as dots; several lines stand side by side."""
    values: list[Value] = _values(runs, along) if along else ["all runs"]
    figure = new_figure(max(5.0, 1.6 + 0.9 * len(values)), 3.6)
    axes = figure.add_subplot()
    series = _values(runs, by) if by else [None]
    for number, one in enumerate(series):
        shift = 0.12 * (number - (len(series) - 1) / 2)
        style = {"color": COLOURS[number % len(COLOURS)], "linestyle": LINES[number % len(LINES)]}
        places, means, spreads = [], [], []
        for place, value in enumerate(values):
            scores = [
                float(run.score or 0.0)
                for run in runs
                if (along is None or run.point[along] == value) and (by is None or run.point[by] == one)
            ]
            if scores:
                places.append(place + shift)
                means.append(float(np.mean(scores)))
                spreads.append(float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0)
                axes.plot([place + shift] * len(scores), scores, "o", color=style["color"], alpha=0.35, markersize=4)
        label = None if by is None else shown(one)
        axes.errorbar(places, means, spreads, marker=MARKERS[number % len(MARKERS)], capsize=3, label=label, **style)
    axes.set_xticks(range(len(values)), [shown(value) for value in values])
    axes.set_xlim(-0.5, len(values) - 0.5)
    axes.set_xlabel(along or "")
    axes.set_ylabel(SCORE)
    axes.grid(axis="y", alpha=0.3)
    axes.set_title("mean and standard deviation over seeds; a dot is a run", fontsize=9)
    if by is not None:
        axes.legend(title=by, fontsize=8, title_fontsize=8)
    return figure


def _panels(runs: Sequence[SweptRun], fields: Sequence[str]) -> Any:
    """Draws each run's score over each field; the best run is ringed."""
    columns = min(COLUMNS, len(fields))
    rows = math.ceil(len(fields) / columns)
    figure = new_figure(1.0 + 3.2 * columns, 0.6 + 2.9 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    scores = [float(run.score or 0.0) for run in runs]
    best = int(np.argmax(scores))
    for axes, field in zip(grid, fields, strict=False):
        places = _places(axes, runs, field)
        axes.plot(places, scores, "o", color=BLUE, alpha=0.6, markersize=5)
        axes.plot([places[best]], [scores[best]], "o", color=RED, markersize=11, fillstyle="none", markeredgewidth=1.6)
        axes.set_xlabel(field, fontsize=9)
        axes.grid(alpha=0.3)
    for axes in grid[len(fields) :]:
        axes.set_visible(False)
    for axes in grid[::columns]:
        axes.set_ylabel(SCORE)
    figure.suptitle("a dot is a run; the ring is the best", fontsize=9)
    return figure


def _places(axes: Any, runs: Sequence[SweptRun], field: str) -> list[float]:
    """Returns where each run is along a field, and sets the ticks: to scale where there are many numbers."""
    values = _values(runs, field)
    numbers = [value for value in values if not isinstance(value, str)]
    if len(numbers) == len(values) > TICKS:
        if numbers[0] > 0 and numbers[-1] / numbers[0] >= 100:
            axes.set_xscale("log")
        return [float(run.point[field]) for run in runs]
    few = len(values) <= TICKS
    axes.set_xticks(range(len(values)) if few else [], [shown(value) for value in values] if few else [])
    return [float(values.index(run.point[field])) for run in runs]
