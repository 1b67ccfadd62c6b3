# SPDX-License-Identifier: Apache-2.0
"""Draws how well a critic's distributions fit the returns that came, and curves of runs side by side."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from verl_dvpo.pictures import calibration as fit
from verl_dvpo.pictures.curves import Curve
from verl_dvpo.pictures.fan import UNIT
from verl_dvpo.pictures.figure import new_figure
from verl_dvpo.pictures.palette import BLACK, BLUE, COLOURS, GREY, LINES, MARKERS, SKY


def calibration_figure(tokens: fit.Tokens) -> Any:
    """Draws four panels: PIT, coverage, returns against values, and the fit by position in the answer.

    A critic without a distribution has no PIT and no coverage; its bias by position is drawn.

    Args:
        tokens: of at least one answer.
    """
    panels: list[Callable[[Any, fit.Tokens], None]] = (
        [_pit, _coverage, _reliability, _coverage_by_position] if tokens.spread else [_reliability, _bias_by_position]
    )
    rows = len(panels) // 2
    figure = new_figure(10.5, 0.7 + 3.4 * rows)
    for axis, draw in zip(figure.subplots(rows, 2, squeeze=False).flat, panels, strict=True):
        draw(axis, tokens)
        axis.grid(alpha=0.3)
    count = "1 answer" if tokens.count == 1 else f"{tokens.count} answers"
    figure.suptitle(f"{count}, {len(tokens.values)} tokens; bars and bands: 95 % intervals over answers", fontsize=10)
    return figure


def _pit(axis: Any, tokens: fit.Tokens) -> None:
    widths, shares = np.diff(fit.EDGES), fit.pit_shares(tokens)
    heights, centres = [share.value for share in shares], np.asarray(fit.EDGES[:-1]) + widths / 2
    axis.bar(centres, heights, width=widths, color=SKY, edgecolor="white", yerr=_bars(shares), ecolor=GREY, capsize=2)
    axis.stairs(widths, fit.EDGES, color=BLACK, linestyle="--", linewidth=1.2, label="calibrated")
    axis.set(title="PIT: at which level of the distribution the return lay", xlim=(0, 1))
    axis.set(xlabel="level (share in [0, 1])", ylabel="share of returns")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=9, loc="upper center")


def _coverage(axis: Any, tokens: fit.Tokens) -> None:
    found = [fit.coverage(tokens, band) for band in fit.BANDS]
    axis.plot([0, 1], [0, 1], color=BLACK, linestyle="--", linewidth=1, label="calibrated")
    axis.errorbar(
        fit.BANDS,
        [each.value for each in found],
        yerr=_bars(found),
        color=BLUE,
        marker="o",
        capsize=3,
        label="observed",
    )
    axis.set(title="coverage of central bands", xlim=(0, 1), ylim=(-0.02, 1.02))
    axis.set(xlabel="share that a band should hold", ylabel="share of returns that it holds")
    axis.legend(fontsize=9, loc="upper left")


def _reliability(axis: Any, tokens: fit.Tokens) -> None:
    parts = fit.reliability(tokens)
    x, found = [part.at for part in parts], [part.estimate for part in parts]
    ends = [min(x), max(x)]
    axis.plot(ends, ends, color=BLACK, linestyle="--", linewidth=1, label="unbiased")
    axis.errorbar(x, [each.value for each in found], yerr=_bars(found), color=BLUE, marker="o", capsize=3)
    axis.set(title="returns where the value was about the same", xlabel="value (units of reward)")
    axis.set_ylabel("mean return that came\n(units of reward)")
    axis.legend(fontsize=9, loc="upper left")


def _coverage_by_position(axis: Any, tokens: fit.Tokens) -> None:
    for band, colour, marker in ((0.9, SKY, "s"), (0.5, BLUE, "o")):
        axis.axhline(band, color=colour, linestyle="--", linewidth=1)
        parts = fit.by_position(fit.inside(tokens, band), tokens)
        _line(axis, parts, colour, marker, f"{band:.0%} band".replace("%", " %"))
    axis.set(title="coverage by position", ylim=(-0.02, 1.02), xlim=(0, 1), ylabel="share of returns in the band")
    axis.set_xlabel("place in the answer (share of its tokens)")
    axis.legend(fontsize=9, loc="best")


def _bias_by_position(axis: Any, tokens: fit.Tokens) -> None:
    parts = fit.by_position(tokens.realised - tokens.values, tokens)
    _line(axis, parts, BLUE, "o", "return less value")
    axis.axhline(0, color=BLACK, linestyle="--", linewidth=1, label="unbiased")
    axis.set(title="bias by position", xlim=(0, 1), xlabel="place in the answer (share of its tokens)", ylabel=UNIT)
    axis.legend(fontsize=9)


def _line(axis: Any, parts: Sequence[fit.Part], colour: str, marker: str, name: str) -> None:
    x, found = [part.at for part in parts], [part.estimate for part in parts]
    axis.errorbar(
        x, [each.value for each in found], yerr=_bars(found), color=colour, marker=marker, capsize=3, label=name
    )


def _bars(found: Sequence[fit.Estimate]) -> np.ndarray:
    """(2, n) lengths below and above; 0 where there is no interval."""
    return np.nan_to_num(np.array([[each.value - each.low, each.high - each.value] for each in found]).T)


def curves_figure(panels: dict[str, list[Curve]]) -> Any:
    """Draws a panel for each metric with a line for each group of runs, and its interval as a band.

    Args:
        panels: title -> curves; at least one.
    """
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(5.4 * columns, 0.9 + 2.9 * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    names = list(dict.fromkeys(curve.group for curves in panels.values() for curve in curves))
    handles: dict[str, Any] = {}
    for axis, (title, curves) in zip(axes, panels.items(), strict=False):
        for curve in curves:
            place = names.index(curve.group)
            look: dict[str, Any] = {"color": COLOURS[place % len(COLOURS)], "linestyle": LINES[place % len(LINES)]}
            if len(curve.steps) <= 20:
                look |= {"marker": MARKERS[place % len(MARKERS)], "markersize": 4}
            (handles[curve.group],) = axis.plot(curve.steps, curve.mean, linewidth=1.5, label=curve.group, **look)
            if curve.runs > 1 and len(curve.steps) == 1:  # no band: caps of different widths tell bars apart
                ends = [curve.mean - curve.low, curve.high - curve.mean]
                axis.errorbar(curve.steps, curve.mean, yerr=ends, color=look["color"], capsize=4 + 4 * place)
            elif curve.runs > 1:
                axis.fill_between(curve.steps, curve.low, curve.high, color=look["color"], alpha=0.15, linewidth=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("training step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_ylabel(curves[0].unit)
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:  # the last row may have room for one more
        axis.set_visible(False)
    sizes = {curve.group: curve.runs for curves in panels.values() for curve in curves}
    texts = [f"{name} ({sizes[name]} run{'s' * (sizes[name] > 1)})" for name in handles]
    figure.legend(list(handles.values()), texts, loc="outside lower center", ncols=min(4, len(texts)), fontsize=9)
    if max(sizes.values()) > 1:
        figure.suptitle("means over runs; bands and bars: 95 % t intervals", fontsize=10)
    return figure
