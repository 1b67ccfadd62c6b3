# SPDX-License-Identifier: Apache-2.0
"""Draws a study's figures.

An algorithm has its own colour, marker and line. Each of the three tells seven algorithms apart, so that neither colour
blindness nor a printer without colours loses them; pairs of the three tell more apart.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

from verl_dvpo.bench.study.results import Results
from verl_dvpo.bench.study.summary import ALL, curves, summarise
from verl_dvpo.pictures.palette import COLOURS, LIGHT_GREY, LINES, MARKERS

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, MaxNLocator

from verl_dvpo.bench.study.forest import forest

SCORE = "validation score (share in [0, 1])"
BAND = "95 % t interval over seeds"


def draw(results: Results, folder: Path, contrasts: pd.DataFrame) -> list[Path]:
    """Draws one PNG file for each figure that the study's axes allow into ``folder``; returns their paths.

    Args:
        results: of the study.
        folder: of the files.
        contrasts: the table of contrasts; empty without hypotheses.
    """
    drawings: dict[str, Callable[[Results], object | None]] = {
        "contrasts": lambda _: forest(contrasts),
        "curves": _curves,
        "noise_rate": _noise_rate,
        "domains": _domains,
    }
    paths = []
    for name, function in drawings.items():
        figure = function(results)
        path = folder / f"{name}.png"
        path.unlink(missing_ok=True)
        if figure is None:
            continue
        # no date or version in the file: equal results give equal files
        figure.savefig(path, dpi=120, metadata={"Software": None})  # type: ignore[attr-defined]
        plt.close(figure)  # type: ignore[arg-type]
        paths.append(path)
    return paths


def style(results: Results, algorithm: str) -> dict:
    """Returns the colour, marker and line that an algorithm has by its place in the study."""
    place = [each.name for each in results.study.algorithms].index(algorithm)
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": LINES[place % len(LINES)],
        "markersize": 5,
        "linewidth": 1.6,
    }


def _panels(rows: int, columns: int):
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(max(7.0, 1.2 + 3.7 * columns), 1.4 + 3.0 * rows),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    return figure, axes


def _finish(figure, axes, title: str) -> None:
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    # in inches: the line with its gaps, and about 0.085 a letter
    entry = 0.85 + 0.085 * max(map(len, handles), default=0)
    columns = max(1, min(len(handles), int(figure.get_figwidth() / entry)))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, handlelength=3.5)
    figure.suptitle(title, fontsize=11)


def _curves(results: Results):
    table = curves(results)
    study = results.study
    figure, axes = _panels(len(study.tasks), len(study.noises))
    for row, task in enumerate(study.tasks):
        for column, noise in enumerate(study.noises):
            axis = axes[row, column]
            axis.set_title(f"{task.name}, {_noise_label(noise.name)}", fontsize=10)
            steps = sorted(table["step"].unique())
            axis.xaxis.set_major_locator(FixedLocator(steps) if len(steps) < 8 else MaxNLocator(integer=True))
            if row == len(study.tasks) - 1:
                axis.set_xlabel("training step")
            if column == 0:
                axis.set_ylabel(SCORE)
            cell = table[(table["task"] == task.name) & (table["noise"] == noise.name)]
            for algorithm in study.algorithms:
                mine = cell[cell["algorithm"] == algorithm.name]
                if mine.empty:
                    continue
                look = style(results, algorithm.name)
                axis.plot(mine["step"], mine["mean"], label=algorithm.name, **look)
                if mine["mean_low"].notna().all():
                    axis.fill_between(
                        mine["step"], mine["mean_low"], mine["mean_high"], color=look["color"], alpha=0.15, linewidth=0
                    )
    band = f"\n(bands: {BAND})" if len(study.seeds) > 1 else ""
    _finish(figure, axes, f"In-domain learning curves, mean over seeds{band}")
    return figure


def _noise_rate(results: Results):
    """Draws final scores against the rate of each kind of noise that has one; clean rewards are rate 0."""
    study = results.study
    kinds = list(dict.fromkeys(noise.kind for noise in study.noises if noise.rate))
    if not kinds:
        return None
    table = summarise(results)
    table = table[(table["domain"] == "in") & (table["task"] != ALL)]
    figure, axes = _panels(len(study.tasks), len(kinds))
    for row, task in enumerate(study.tasks):
        for column, kind in enumerate(kinds):
            axis = axes[row, column]
            axis.set_title(f"{task.name}, noise: {kind}", fontsize=10)
            if row == len(study.tasks) - 1:
                axis.set_xlabel("rate of corrupted rewards (share in [0, 1])")
            if column == 0:
                axis.set_ylabel(f"final {SCORE}")
            rates = {noise.name: noise.rate for noise in study.noises if noise.rate == 0.0 or noise.kind == kind}
            gap = 0.012 * max(rate for rate in rates.values() if rate is not None)
            for place, algorithm in enumerate(study.algorithms):
                mine = table[(table["task"] == task.name) & (table["algorithm"] == algorithm.name)]
                mine = mine[mine["noise"].isin(list(rates))]
                if mine.empty:  # no arm, or no run yet
                    continue
                mine = mine.assign(rate=mine["noise"].map(rates)).dropna(subset="rate").sort_values("rate")
                # side by side, so that intervals do not hide each other
                x = mine["rate"] + gap * (place - (len(study.algorithms) - 1) / 2)
                _errorbar(axis, x, mine, "mean", label=algorithm.name, **style(results, algorithm.name))
    _finish(figure, axes, f"Final in-domain score against noise, mean over seeds\n(bars: {BAND})")
    return figure


def _domains(results: Results):
    table = summarise(results)
    if not (table["domain"] == "out").any():
        return None
    study = results.study
    figure, axes = _panels(len(study.tasks), len(study.noises))
    keys = ["task", "noise", "algorithm"]
    both = table[table["domain"] == "in"].merge(table[table["domain"] == "out"], on=keys, suffixes=("_in", "_out"))
    ends = both[["mean_in", "mean_out"]]
    shared = [ends.min().max(), ends.max().min()]  # where the two ranges overlap, if they do
    for row, task in enumerate(study.tasks):
        for column, noise in enumerate(study.noises):
            axis = axes[row, column]
            axis.set_title(f"trained on {task.name}, {_noise_label(noise.name)}", fontsize=10)
            if shared[0] < shared[1]:  # a line far from all points would only shrink them
                axis.plot(*[shared] * 2, color=LIGHT_GREY, linewidth=0.8, label="equal scores")
            if row == len(study.tasks) - 1:
                axis.set_xlabel("final in-domain score (share in [0, 1])")
            if column == 0:
                axis.set_ylabel("final out-of-domain score\n(share in [0, 1])")
            cell = both[(both["task"] == task.name) & (both["noise"] == noise.name)]
            for algorithm in study.algorithms:
                mine = cell[cell["algorithm"] == algorithm.name]
                look = style(results, algorithm.name) | {"linestyle": "none", "alpha": 0.85}
                axis.errorbar(
                    mine["mean_in"],
                    mine["mean_out"],
                    xerr=_bars(mine, "mean", "_in"),
                    yerr=_bars(mine, "mean", "_out"),
                    capsize=2,
                    elinewidth=1,
                    label=algorithm.name,
                    **look,
                )
    bars = f"\n(bars: {BAND})" if len(study.seeds) > 1 else ""
    _finish(figure, axes, f"In-domain against out-of-domain, mean over seeds{bars}")
    return figure


def _errorbar(axis, x: pd.Series, rows: pd.DataFrame, name: str, **look) -> None:
    axis.errorbar(x, rows[name], yerr=_bars(rows, name), capsize=2, elinewidth=1, **look)


def _bars(rows: pd.DataFrame, name: str, suffix: str = "") -> np.ndarray:
    """Returns (2, rows) lengths of error bars below and above; 0 without an interval."""
    value = rows[f"{name}{suffix}"].to_numpy()
    below = value - rows[f"{name}_low{suffix}"].to_numpy()
    above = rows[f"{name}_high{suffix}"].to_numpy() - value
    return np.nan_to_num(np.stack([below, above]))


def _noise_label(name: str) -> str:
    return "clean rewards" if name == "none" else f"noise {name}"
