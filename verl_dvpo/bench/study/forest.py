# SPDX-License-Identifier: Apache-2.0
"""Draws the contrasts of a study: differences with their intervals, one below the other."""

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt

from verl_dvpo.bench.study.contrasts import Judgement
from verl_dvpo.pictures.palette import BLACK, BLUE, GREY, LIGHT_GREY, RED

#: Verdict -> colour and marker; the marker tells them apart without colours.
LOOK = {
    Judgement.SUPPORTED: (BLUE, "o"),
    Judgement.CONTRADICTED: (RED, "X"),
    Judgement.UNDECIDED: (BLACK, "s"),
    Judgement.OPEN: (GREY, "D"),
}


def forest(table: pd.DataFrame):
    """Returns a figure of the contrasts, primary ones first; None where none has a pair of runs.

    Filled markers are primary contrasts. A bar across marks the size that is expected, a shaded half the side.

    Args:
        table: as ``contrasts_table`` returns it.
    """
    shown = table[table["seeds"] > 0] if len(table) else table
    if shown.empty:
        return None
    shown = shown.sort_values("primary", ascending=False, kind="stable").reset_index(drop=True)
    figure, axis = plt.subplots(figsize=(8.0, 1.9 + 0.55 * len(shown)), layout="constrained")
    for place, row in shown.iterrows():
        colour, marker = LOOK[Judgement(row["verdict"])]
        side = 1.0 if row["direction"] == "higher" else -1.0
        axis.barh(place, side * _reach(shown), height=0.8, color=LIGHT_GREY, alpha=0.18, linewidth=0)
        if pd.notna(row["expected"]):
            axis.plot([row["expected"]] * 2, [place - 0.3, place + 0.3], color=GREY, linewidth=1.2, linestyle=":")
        ends = [[row["difference"] - row["difference_low"]], [row["difference_high"] - row["difference"]]]
        axis.errorbar(
            row["difference"],
            place,
            xerr=np.nan_to_num(ends),
            color=colour,
            marker=marker,
            markersize=7,
            markerfacecolor=colour if row["primary"] else "white",
            capsize=3,
            linestyle="none",
            label=row["verdict"],
        )
    axis.axvline(0.0, color=BLACK, linewidth=0.8)
    axis.set_xlim(-_reach(shown), _reach(shown))
    axis.set_yticks(range(len(shown)), [f"{row.contrast} (n = {row.seeds})" for row in shown.itertuples()], fontsize=9)
    axis.invert_yaxis()
    axis.set_xlabel("score, treatment minus control (95 % t interval over seeds)")
    # the first of each verdict: primary contrasts come first, and theirs are filled
    handles = dict(reversed(list(zip(*axis.get_legend_handles_labels()[::-1], strict=True))))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=9)
    title = "Pre-registered contrasts; filled: primary; shaded: expected side"
    figure.suptitle(title + ("; dotted: expected size" if shown["expected"].notna().any() else ""), fontsize=11)
    return figure


def _reach(table: pd.DataFrame) -> float:
    """Returns the largest absolute value that is drawn, with a margin."""
    drawn = table[["difference", "difference_low", "difference_high", "expected"]].astype(float).abs().max().max()
    return 1.08 * max(float(drawn), 1e-3)
