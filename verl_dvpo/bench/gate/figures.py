# SPDX-License-Identifier: Apache-2.0
"""Draws what critics explain at each position of a response, a panel for each task."""

from pathlib import Path

import matplotlib
import pandas as pd

from verl_dvpo.bench.gate.variance import AT, BETWEEN, LENGTH
from verl_dvpo.bench.gate.verdict import LEAST_EXPLAINED, over_seeds
from verl_dvpo.bench.statistics import t_interval
from verl_dvpo.pictures.palette import BLACK, COLOURS, GREY, MARKERS

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def draw(measured: pd.DataFrame, path: Path) -> None:
    """Draws one panel for each task into the PNG file ``path``: mean over seeds, with the interval as a band.

    Positions are drawn up to twice the mean length of a response; few responses are longer.
    """
    tasks = list(dict.fromkeys(measured["task"]))
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.2 * len(tasks) + 0.8, 3.8), sharey=True, squeeze=False)
    critics = [name for name in dict.fromkeys(measured["critic"]) if name]
    for axis, task in zip(axes[0], tasks, strict=True):
        mine = measured[(measured["task"] == task) & (measured["quantity"] == AT)]
        last = 2 * over_seeds(measured, task, LENGTH)[""].value
        for index, critic in enumerate(critics):
            rows = mine[(mine["critic"] == critic) & (mine["position"] < last)]
            at = [(place, t_interval(group["value"].dropna())) for place, group in rows.groupby("position")]
            colour = COLOURS[index % len(COLOURS)]
            style = {"color": colour, "marker": MARKERS[index % len(MARKERS)], "markersize": 4, "label": critic}
            axis.plot([place + 1 for place, _ in at], [e.value for _, e in at], **style)
            ends = [[getattr(e, end) for _, e in at] for end in ("low", "high")]
            axis.fill_between([place + 1 for place, _ in at], *ends, color=colour, alpha=0.15, linewidth=0)
        share = over_seeds(measured, task, BETWEEN)[""].value
        axis.axhline(share, color=BLACK, linestyle="--", linewidth=1, label="share between prompts")
        axis.axhline(LEAST_EXPLAINED, color=GREY, linestyle=":", linewidth=1.2, label="gate")
        axis.set(title=task, xlabel="token of the response", ylim=(-0.1, 1.0))
    axes[0][0].set_ylabel("explained variance of the return")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=len(labels), bbox_to_anchor=(0.5, 0.98), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
