# SPDX-License-Identifier: Apache-2.0
"""Draws the lab's figures from its JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from verl_dvpo.bench.statistics import Estimate, ratio_interval, t_interval
from verl_dvpo.pictures.palette import BLACK, BLUE, GREEN, GREY, MARKERS, ORANGE, RED

from .experiments import CONDITIONS, EXPERIMENTS, run_key
from .registry import KAPPAS

matplotlib.use("Agg")
from matplotlib import pyplot as plt

#: What the terms are added to, in words: ``registry.BASES``.
BASE_LABELS = {
    "eq2": "κ = 0, midpoints, Eq 2",
    "sr": "κ = 0, midpoints, sample replacement",
    "paper": "κ = 1, right levels, Eq 2",
}


def figures(result: dict, folder: Path) -> list[Path]:
    """Draws one PNG file for each experiment of the run into ``folder``; returns their paths."""
    drawn = {
        "spread": _spread,
        "kappa": _kappa,
        "runaway": _runaway,
        "terms": lambda r: _ratios(r, "terms"),
        "terms_paper": lambda r: _ratios(r, "terms_paper"),
        "forms": lambda r: _ratios(r, "forms"),
        "search": lambda r: _ratios(r, "search"),
        "families": _families,
        "density": lambda r: _choices(r, "density"),
        "risk": lambda r: _choices(r, "risk"),
        "long": lambda r: _long(r, "long"),
        "long_runaway": lambda r: _long(r, "long_runaway"),
        "long_forms": lambda r: _long(r, "long_forms"),
    }
    paths = []
    for name in result["meta"]["experiments"]:
        figure = drawn[name](result)
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=110, bbox_inches="tight")
        plt.close(figure)
        paths.append(path)
    return paths


def _errorbar(axis, x, intervals: Sequence[Estimate], *, horizontal: bool = False, **style) -> None:
    mean = np.array([i.value for i in intervals])
    spread = np.array([[i.value - i.low for i in intervals], [i.high - i.value for i in intervals]])
    if horizontal:
        axis.errorbar(mean, x, xerr=spread, capsize=2, **style)
    else:
        axis.errorbar(x, mean, yerr=spread, capsize=3, **style)


def _spread(result: dict):
    figure, axis = plt.subplots(figsize=(6, 4))
    rows = result["spread"]
    for kind, colour, marker in (("quantile_gae", RED, "o"), ("sample_replacement", BLUE, "s")):
        mine = [row for row in rows if row["kind"] == kind]
        label = {"quantile_gae": "Eq 2", "sample_replacement": "sample replacement"}[kind]
        _errorbar(
            axis,
            [row["lam"] for row in mine],
            [t_interval(row["std"]) for row in mine],
            color=colour,
            marker=marker,
            label=label,
        )
    axis.axhline(rows[0]["true_std"], color=BLACK, linestyle="--", linewidth=1, label="truth")
    axis.set(xlabel="trace λ", ylabel="standard deviation of the start state's value [reward]", ylim=(0, None))
    axis.set_title("Spread at the fixed point, label process")
    axis.legend()
    return figure


def _metric(result: dict, critic: str, condition: tuple[str, str], name: str, longer: int = 1) -> list[float]:
    updates = result["meta"]["config"]["updates"] * longer
    return result["runs"][run_key(critic, *condition, updates)]["metrics"][name]


def _kappa(result: dict):
    conditions = EXPERIMENTS["kappa"].conditions
    figure, axes = plt.subplots(1, len(conditions), figsize=(5 * len(conditions), 3.8), sharey=True)
    for axis, condition in zip(axes, conditions, strict=True):
        for levels, colour, marker in (("right", RED, "o"), ("midpoint", BLUE, "s")):
            intervals = [
                t_interval(_metric(result, f"{levels}, kappa {kappa:g}", condition, "v_error")) for kappa in KAPPAS
            ]
            _errorbar(axis, range(len(KAPPAS)), intervals, color=colour, marker=marker, label=f"{levels} levels")
        axis.set_xticks(range(len(KAPPAS)), [f"{kappa:g}" for kappa in KAPPAS])
        axis.set(title=CONDITIONS[condition], xlabel="κ [reward]")
    axes[0].set_ylim(0, None)
    axes[0].set_ylabel("error of V [reward]")
    axes[0].legend()
    return figure


def _runaway(result: dict):
    """Draws the error of V along training: means over seeds, with bands from the least to the greatest seed."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), sharey=True)
    condition = EXPERIMENTS["runaway"].conditions[0]
    for axis, (base, title) in zip(axes, BASE_LABELS.items(), strict=True):
        for mode, colour in (("token", RED), ("batch", BLUE)):
            for label, dash in (("all", "-"), ("shift", "--")):
                critic = f"{base} {mode}, {label} 0.1"
                _curve(axis, result, critic, condition, color=colour, linestyle=dash, label=f"{mode}, {label}")
        axis.set(title=title, xlabel="updates", yscale="log")
    axes[0].set_ylabel("error of V [reward]")
    axes[0].legend(title="constraint, terms at 0.1")
    return figure


def _curve(axis, result: dict, critic: str, condition: tuple[str, str], longer: int = 1, **style) -> None:
    run = result["runs"][run_key(critic, *condition, result["meta"]["config"]["updates"] * longer)]
    curves = np.array(run["curve"])
    axis.plot(run["at"], curves.mean(0), **style)
    axis.fill_between(run["at"], curves.min(0), curves.max(0), color=style["color"], alpha=0.15, linewidth=0)


def _ratios(result: dict, name: str):
    experiment = EXPERIMENTS[name]
    pairs = [(critic, reference) for critic, reference in experiment.pairs() if critic != reference]
    rows = [critic for critic, _ in pairs]
    colours = {"eq2": RED, "sr": BLUE, "paper": GREEN}
    height = 0.27 * len(rows) + 1.2
    figure, axes = plt.subplots(1, len(experiment.conditions), figsize=(3.6 * len(experiment.conditions) + 2, height))
    for axis, condition in zip(axes, experiment.conditions, strict=True):
        for y, (critic, reference) in enumerate(pairs):
            base = _metric(result, reference, condition, "v_error")
            interval = ratio_interval(_metric(result, critic, condition, "v_error"), base)
            colour = colours[reference.split(" ")[1]]
            _errorbar(axis, [y], [interval], horizontal=True, color=colour, marker="o", markersize=4)
        axis.axvline(1.0, color=BLACK, linewidth=1)
        axis.axvline(1.1, color=GREY, linestyle="--", linewidth=1)
        axis.set_yticks(range(len(rows)), rows if axis is axes[0] else [""] * len(rows))
        axis.set(title=CONDITIONS[condition], xlabel="error of V / quantile alone", ylim=(len(rows) - 0.5, -0.5))
    drawn = dict.fromkeys(reference.split(" ")[1] for _, reference in pairs)
    handles = [plt.Line2D([], [], color=colours[base], marker="o", label=BASE_LABELS[base]) for base in drawn]
    handles.append(plt.Line2D([], [], color=GREY, linestyle="--", label="10 % more"))
    figure.legend(handles=handles, loc="lower center", ncol=4, bbox_to_anchor=(0.5, 1.0))
    figure.tight_layout()
    return figure


def _families(result: dict):
    experiment = EXPERIMENTS["families"]
    names = {
        "v_error": "error of V [reward]",
        "crps_excess": "CRPS excess [reward]",
        "lower_tail_error": "lower tail's error [reward]",
        "upper_tail_error": "upper tail's error [reward]",
    }
    figure, axes = plt.subplots(1, 4, figsize=(14, 0.42 * len(experiment.critics) + 1.2))
    for axis, (name, label) in zip(axes, names.items(), strict=True):
        for i, condition in enumerate(experiment.conditions):
            intervals = [t_interval(_metric(result, critic, condition, name)) for critic in experiment.critics]
            y = np.arange(len(experiment.critics)) + 0.17 * (i - 1.5)
            colour = (BLUE, GREEN, ORANGE, RED)[i]
            style = {"color": colour, "marker": MARKERS[i], "markersize": 4, "linestyle": "none"}
            _errorbar(axis, y, intervals, horizontal=True, label=CONDITIONS[condition], **style)
        rows = experiment.critics
        axis.set_yticks(range(len(rows)), rows if axis is axes[0] else [""] * len(rows))
        axis.set(xlabel=label, ylim=(len(rows) - 0.5, -0.5), xlim=(0, None))
        axis.grid(axis="y", alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=4, bbox_to_anchor=(0.5, 1.0))
    figure.tight_layout()
    return figure


def _choices(result: dict, name: str):
    """Draws the error of V of each candidate, and of the choice among them, over another metric that they move."""
    experiment = EXPERIMENTS[name]
    other = {"density": {"crps_excess": "CRPS excess [reward]"}, "risk": {"v_bias": "bias of V [reward]"}}
    metrics = {"v_error": "error of V [reward]", **other[name]}
    width = 3.4 * len(experiment.conditions)
    figure, axes = plt.subplots(len(metrics), len(experiment.conditions), figsize=(width, 6), squeeze=False)
    for row, (metric, unit) in zip(axes, metrics.items(), strict=True):
        for axis, condition in zip(row, experiment.conditions, strict=True):
            for base, colour, marker in (("sr", BLUE, "s"), ("paper", GREEN, "o")):
                mine = [critic for critic in experiment.critics if critic.startswith(f"{base}, ")]
                intervals = [t_interval(_metric(result, critic, condition, metric)) for critic in mine]
                places = np.arange(len(mine)) + (0.12 if base == "paper" else -0.12)
                label = BASE_LABELS[base]
                _errorbar(axis, places, intervals, color=colour, marker=marker, linestyle="none", label=label)
                axis.set_xticks(range(len(mine)), [critic.split()[-1] for critic in mine])
            axis.set(title=CONDITIONS[condition], ylim=(None if metric == "v_bias" else 0, None))
        row[0].set_ylabel(unit)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=2, bbox_to_anchor=(0.5, 1.0))
    figure.supxlabel({"density": "levels M", "risk": "risk weight c"}[name])
    figure.tight_layout()
    return figure


def _long(result: dict, name: str):
    """Draws the error of V along training: means over seeds, with bands from the least to the greatest seed."""
    experiment = EXPERIMENTS[name]
    figure, axes = plt.subplots(1, len(experiment.conditions), figsize=(5 * len(experiment.conditions), 3.8))
    colours = (BLACK, RED, ORANGE, GREY, GREEN, BLUE)
    for axis, condition in zip(axes, experiment.conditions, strict=True):
        for i, critic in enumerate(experiment.critics):
            style = {"color": colours[i], "linestyle": ("-", "--")[i % 2], "label": critic}
            _curve(axis, result, critic, condition, experiment.longer, **style)
        axis.set(title=CONDITIONS[condition], xlabel="updates", yscale="log")
    axes[0].set_ylabel("error of V [reward]")
    axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    return figure
