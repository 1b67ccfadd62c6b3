# SPDX-License-Identifier: Apache-2.0
"""Draws what a critic believes along an answer: a fan of quantiles over its tokens, heads and advantages below.

A state stands at a whole number, and the token that is written from it between it and the next. So what a token did to
the critic's belief is seen above that token.

Shape legend: T response tokens, V of them valid, N heads.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from verl_dvpo.pictures.choose import MEDIAN, Shown
from verl_dvpo.pictures.figure import new_figure
from verl_dvpo.pictures.palette import BLACK, BLUE, COLOURS, GREY, LIGHT_GREY, ORANGE, RED, SKY
from verl_dvpo.saved.values import LEVELS, Answer

#: Up to this many tokens each has its text below the fan; longer answers have numbers.
LABELLED = 64

#: Up to this many heads each has a line of its own.
HEADS = 8

#: Heights of the panels in inches.
HEIGHTS = {"fan": 2.7, "heads": 1.1, "advantages": 1.1}

#: Height of a line of the legend in inches.
LEGEND = 0.3

BANDS = ((0.05, 0.95, SKY, 0.35, "90 % of the distribution"), (0.25, 0.75, BLUE, 0.35, "50 % of the distribution"))

UNIT = "return (units of reward)"


def fan_figure(shown: Sequence[Shown], *, panels: Sequence[str] = tuple(HEIGHTS)) -> Any:
    """Draws answers one below the other.

    Args:
        shown: at least one.
        panels: of ``HEIGHTS``; those for which an answer has no numbers are left out of it.
    """
    wanted = [[name for name in panels if _has(each.answer, name)] for each in shown]
    longest = max(len(each.answer.ids) for each in shown)
    width = float(np.clip(2.2 + 0.3 * min(longest, LABELLED), 7.5, 15.0))
    lines = 1 + any(name == "heads" for names in wanted for name in names)
    heights = [*(1.1 + sum(HEIGHTS[name] for name in names) for names in wanted), LEGEND * lines]
    figure = new_figure(width, sum(heights))
    *parts, last = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights, hspace=0.0)[:, 0]
    fans = []
    for part, each, names in zip(parts, shown, wanted, strict=True):
        part.suptitle(_title(each), fontsize=11, x=0.01, ha="left", parse_math=False)
        ratios = [HEIGHTS[name] for name in names]
        axes = part.subplots(len(names), 1, squeeze=False, sharex=True, height_ratios=ratios)[:, 0]
        for axis, name in zip(axes, names, strict=True):
            {"fan": _fan, "heads": _heads, "advantages": _advantages}[name](axis, each.answer)
            _ground(axis, each.answer)
            fans += [axis] * (name == "fan")
        _tokens(axes[-1], each.answer)
        part.align_ylabels(axes)
    ends = np.array([axis.get_ylim() for axis in fans])
    for axis in fans:  # one scale, so that answers can be compared
        axis.set_ylim(ends[:, 0].min(), ends[:, 1].max())
    _legend(last, [axis for part in parts for axis in part.axes])
    return figure


def has_spread(answer: Answer) -> bool:
    """Tells if a state of the answer has a distribution; with a scalar critic none has."""
    return bool((answer.quantiles[:, -1] > answer.quantiles[:, 0]).any())


def label(answer: Answer, token: int, longest: int = 10) -> str:
    """Returns the text of a token in one line, blanks and line ends made visible; its number where there is no text."""
    if not answer.pieces:
        return str(int(answer.ids[token]))
    text = answer.pieces[token].replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
    text = "".join(letter if letter.isprintable() else "?" for letter in text).removeprefix("<|").removesuffix("|>")
    text = text or "∅"
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def turn(answer: Answer) -> tuple[int, float, float] | None:
    """Finds the token that moves the median most: its place, and the median before and after; None if none does."""
    at = np.flatnonzero(answer.mask)
    median = answer.quantiles[:, MEDIAN].astype(float)
    moves = [(abs(median[after] - median[before]), before, after) for before, after in pairwise(at.tolist())]
    size, before, after = max(moves, default=(0.0, 0, 0))
    return (before, median[before], median[after]) if size > 0 else None


def _legend(place: Any, axes: Sequence[Any]) -> None:
    """Puts one legend under all panels: a line of the fan, and below it one of the heads."""
    known: dict[str, Any] = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            known.setdefault(name, handle)
    heads = [name for name in known if name.startswith("head ")]
    rest = [name for name in known if name not in heads]
    for names, where in ((rest, "upper center"), (heads, "lower center")):
        if names:
            place.legend([known[name] for name in names], names, loc=where, ncols=len(names), fontsize=9, frameon=False)


def _has(answer: Answer, panel: str) -> bool:
    if panel == "heads":
        return answer.heads.shape[-1] > 1
    return panel != "advantages" or answer.advantages is not None


def _title(shown: Shown) -> str:
    step = f"step {shown.step}: " if shown.step >= 0 else ""
    prompt = " ".join(shown.answer.prompt.split())
    prompt = f"“{prompt if len(prompt) <= 60 else prompt[:28] + ' … ' + prompt[-28:]}”, " if prompt else ""
    return f"{step}{prompt}reward {shown.answer.reward:.3g}"


def _states(answer: Answer, numbers: np.ndarray) -> np.ndarray:
    """Blanks the states from which the policy did not write, so that no line runs through them."""
    mask = answer.mask.reshape(-1, *[1] * (numbers.ndim - 1))
    return np.where(mask, numbers.astype(float), np.nan)


def _fan(axis: Any, answer: Answer) -> None:
    x = np.arange(len(answer.ids))
    quantiles = _states(answer, answer.quantiles)
    if has_spread(answer):
        for low, high, colour, alpha, name in BANDS:
            ends = quantiles[:, LEVELS.index(low)], quantiles[:, LEVELS.index(high)]
            axis.fill_between(x, *ends, color=colour, alpha=alpha, linewidth=0, label=name)
        axis.plot(x, quantiles[:, MEDIAN], color=BLUE, linewidth=2, label="median", marker="o", markersize=2.5)
    name = "value (mean)" if has_spread(answer) else "value (this critic has no distribution)"
    axis.plot(x, _states(answer, answer.values), color=BLACK, linewidth=1, linestyle="--", label=name)
    last = int(np.flatnonzero(answer.mask)[-1])
    came = np.append(_states(answer, answer.realised)[: last + 1], answer.realised[last])
    axis.plot(np.arange(last + 2), came, color=RED, linewidth=1.2, linestyle=":", label="return that came")
    axis.plot(last + 1, answer.realised[last], color=RED, marker="D", markersize=8, clip_on=False, zorder=5)
    if (found := turn(answer)) is not None:
        token, before, after = found
        axis.axvspan(token, token + 1, color=ORANGE, alpha=0.3, linewidth=0)
        right = token > 0.6 * len(answer.ids)
        axis.annotate(
            f"“{label(answer, token)}”: median {before:.2f} → {after:.2f}",
            (token + (0 if right else 1), 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(-4 if right else 4, -4),
            textcoords="offset points",
            ha="right" if right else "left",
            va="top",
            fontsize=9,
            bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.5},
            parse_math=False,
        )
    axis.margins(y=0.12)
    axis.set_ylabel(UNIT)


def _heads(axis: Any, answer: Answer) -> None:
    x, heads = np.arange(len(answer.ids)), _states(answer, answer.heads)
    apart = heads - heads.mean(-1, keepdims=True)
    axis.axhline(0, color=LIGHT_GREY, linewidth=0.8)
    if apart.shape[-1] <= HEADS:
        for head, colour in zip(range(apart.shape[-1]), COLOURS, strict=False):
            axis.plot(x, apart[:, head], color=colour, linewidth=1.4, label=f"head {head + 1}")
    else:
        spread = apart.std(-1)
        axis.fill_between(x, -spread, spread, color=BLUE, alpha=0.35, linewidth=0)
    axis.margins(y=0.15)
    axis.set_ylabel("heads less their\nmean (reward)")


def _advantages(axis: Any, answer: Answer) -> None:
    assert answer.advantages is not None
    x, heights = np.arange(len(answer.ids)) + 0.5, np.where(answer.mask, answer.advantages.astype(float), 0.0)
    axis.bar(x, heights, width=0.8, color=[BLUE if height >= 0 else RED for height in heights])
    axis.axhline(0, color=GREY, linewidth=0.8)
    axis.margins(y=0.15)
    axis.set_ylabel("advantage\n(whitened)")


def _ground(axis: Any, answer: Answer) -> None:
    """Marks the tokens that the policy did not write."""
    axis.grid(axis="y", alpha=0.3)
    for token in np.flatnonzero(~answer.mask).tolist():
        axis.axvspan(token, token + 1, color=GREY, alpha=0.15, linewidth=0)
    axis.set_xlim(-0.3, len(answer.ids) + 0.3)


def _tokens(axis: Any, answer: Answer) -> None:
    size = len(answer.ids)
    if size > LABELLED:
        axis.set_xlabel("token of the response (number)")
        return
    texts = [label(answer, token) for token in range(size)]
    axis.set_xticks(np.arange(size) + 0.5, texts, fontsize=9, parse_math=False)
    for text in axis.get_xticklabels():
        text.set_rotation(90 if len(text.get_text()) > 2 else 0)
    axis.tick_params(axis="x", length=0)
    axis.set_xlabel("token of the response, between the state it was written from and the state it led to")
