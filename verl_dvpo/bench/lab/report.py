# SPDX-License-Identifier: Apache-2.0
"""Writes the lab's Markdown report from its JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from verl_dvpo.bench.common import markdown_table
from verl_dvpo.bench.statistics import Estimate, ratio_interval, t_interval

from .experiments import CONDITIONS, EXPERIMENTS, Experiment, run_key
from .metrics import METRICS

#: Metric -> heading of its column. Columns that end in ``_seen`` appear for corrupted rewards only.
HEADINGS = {
    "v_error": "error of V",
    "v_bias": "bias of V",
    "v_error_seen": "error of V, seen",
    "crps_excess": "CRPS excess",
    "coverage_80": "coverage 80 %",
    "lower_tail_error": "lower tail",
    "upper_tail_error": "upper tail",
    "lower_tail_seen": "lower tail, seen",
    "upper_tail_seen": "upper tail, seen",
    "spread_ratio": "spread / true",
}
#: Metrics that a critic without a distribution does not have.
NO_DISTRIBUTION = ("coverage_80", "spread_ratio")


def markdown(result: dict) -> str:
    """Returns the whole report.

    Args:
        result: what ``experiments.run`` returned, or its JSON read back.
    """
    meta = result["meta"]
    config = meta["config"]
    lines = [
        "# Critic lab",
        "",
        f"Seeds {len(meta['seeds'])}; {config['updates']} updates of {config['batch']} sequences in "
        f"{config['mini_batches']} optimiser steps each; Adam at {config['learning_rate']:g}; "
        f"model `{config['model']}`; gamma {config['gamma']:g}, lambda {config['lam']:g}; "
        f"N = {meta['num_heads']}, M = {meta['num_quantiles']}.",
        "Each entry is the mean over seeds with the half width of its 95 % t interval. All errors are against the",
        "clean truth, which is exact, averaged over states by how often they are visited:",
        "",
        *(f"- {HEADINGS[name]}: {METRICS[name]}" for name in HEADINGS),
        "",
    ]
    for name in meta["experiments"]:
        if name == "spread":
            lines += _spread_section(result["spread"])
        else:
            lines += _experiment_section(EXPERIMENTS[name], result)
    return "\n".join(lines).rstrip() + "\n"


def _spread_section(rows: Sequence[dict]) -> list[str]:
    headings = ["target kind", "lambda", "mean", "true mean", "standard deviation", "true"]
    cells = [
        [
            row["kind"],
            f"{row['lam']:g}",
            show(t_interval(row["mean"])),
            f"{row['true_mean']:.3f}",
            show(t_interval(row["std"])),
            f"{row['true_std']:.3f}",
        ]
        for row in rows
    ]
    return [
        "## The spread of each target kind at its fixed point",
        "",
        "Start state of the label process, pooled targets, no fitting error (docs/method.md, section 3).",
        "",
        *markdown_table(headings, cells),
    ]


def _experiment_section(experiment: Experiment, result: dict) -> list[str]:
    updates = result["meta"]["config"]["updates"] * experiment.longer
    lines = [f"## {experiment.title}", ""]
    for process, noise in experiment.conditions:
        columns = [name for name in HEADINGS if noise != "clean" or not name.endswith("_seen")]
        ratio = ["error / quantile alone"] if experiment.baseline else []
        runs = {critic: result["runs"][run_key(critic, process, noise, updates)] for critic in experiment.critics}
        choices = ["chosen"] if any("chosen" in run for run in runs.values()) else []
        rows = []
        for critic, reference in experiment.pairs():
            metrics = runs[critic]["metrics"]
            alone = result["runs"][run_key(reference, process, noise, updates)]["metrics"] if ratio else {}
            against = [show(ratio_interval(metrics["v_error"], alone["v_error"]), ratio=True)] if ratio else []
            rows.append([critic, *against, *_cells(metrics, columns), *([_choice(runs[critic])] if choices else [])])
        truth = ["" if name.endswith("_seen") else f"{result['truth'][process][name]:.3f}" for name in columns]
        rows.append(["*exact quantiles*", *("" for _ in ratio), *truth, *("" for _ in choices)])
        lines += [f"### {CONDITIONS[process, noise]}, {updates} updates", ""]
        lines += markdown_table(["critic", *ratio, *(HEADINGS[name] for name in columns), *choices], rows)
    return lines


def _choice(run: dict) -> str:
    """Returns what was chosen at the end, with the number of seeds: ``21 (5), 63 (3)``; empty where nothing was."""
    if "chosen" not in run:
        return ""
    (name,) = run["chosen"][0][-1]
    count = Counter(seed[-1][name] for seed in run["chosen"])
    return ", ".join(f"{value:g} ({seeds})" for value, seeds in sorted(count.items()))


def _cells(metrics: dict, columns: Sequence[str]) -> list[str]:
    point = metrics["spread_ratio"][0] == 0.0
    return ["–" if point and name in NO_DISTRIBUTION else show(t_interval(metrics[name])) for name in columns]


def show(interval: Estimate, *, ratio: bool = False) -> str:
    """Returns ``mean ± half width``, or ``mean (low to high)`` for a ratio; ``diverged`` if a seed is not finite."""
    mean, low, high = interval
    if mean == float("inf"):
        return "diverged"
    return f"{mean:.2f} ({low:.2f} to {high:.2f})" if ratio else f"{mean:.3f} ± {high - mean:.3f}"
