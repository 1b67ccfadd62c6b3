# SPDX-License-Identifier: Apache-2.0
"""The figure and the table of a fit, for the folder of the critic."""

import json
from pathlib import Path
from typing import Any

from verl_dvpo.pretrain.fit import FitConfig, Fitted
from verl_dvpo.pretrain.measure import PARTS, STEPS
from verl_dvpo.saved.files import write_text

FIGURE, TABLE = "pretraining.png", "pretraining.json"

#: Okabe and Ito's colours, which the colour-blind can tell apart.
BLUE, RED, GREY = "#0072B2", "#D55E00", "#999999"


def write_report(folder: Path, fitted: Fitted, config: FitConfig, about: dict[str, Any]) -> None:
    """Writes ``pretraining.json`` and ``pretraining.png`` into ``folder``.

    Args:
        folder: that exists.
        fitted: what ``fit`` returned.
        config: with which settings.
        about: numbers of sequences and prompts.
    """
    content = {
        **about,
        "config": config.__dict__,
        "best": fitted.best,
        "losses": fitted.losses,
        "held_out": [measured.plain() for measured in fitted.history],
    }
    write_text(folder / TABLE, json.dumps(content, indent=2) + "\n")
    draw(folder / FIGURE, fitted)


def draw(file: Path, fitted: Fitted) -> None:
    """Draws held-out scores over epochs, explained variance by position, and calibration, before and after."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    first, best = fitted.history[0], fitted.history[fitted.best]
    figure, (scores, places, levels) = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    epochs = range(len(fitted.history))
    scores.plot(epochs, [measured.crps for measured in fitted.history], "o-", color=BLUE, label="CRPS")
    scores.axvline(fitted.best, color=GREY, linestyle=":")
    scores.set(xlabel="epoch", ylabel="held-out CRPS", title=f"best after epoch {fitted.best}")
    other = scores.twinx()
    other.plot(epochs, [measured.explained_variance for measured in fitted.history], "s--", color=RED)
    other.set_ylabel("explained variance (dashed)")
    centres = [(part + 0.5) / PARTS for part in range(PARTS)]
    steps = [step / STEPS for step in range(1, STEPS)]
    for measured, name, style, colour in ((first, "before", "o--", GREY), (best, "after", "s-", BLUE)):
        places.plot(centres, [max(value, -1.0) for value in measured.by_position], style, color=colour, label=name)
        levels.plot(steps, measured.calibration, style, color=colour, label=name, markersize=4)
    places.set(xlabel="place in the response", ylabel="explained variance (cut at -1)", title="by position")
    places.axhline(0.0, color=GREY, linewidth=0.8)
    levels.plot([0, 1], [0, 1], color=GREY, linewidth=0.8)
    levels.set(xlabel="level", ylabel="share of returns below", title="calibration")
    for axis in (places, levels):
        axis.legend(frameon=False)
    figure.savefig(file, dpi=120, metadata={"Software": None})
    plt.close(figure)
