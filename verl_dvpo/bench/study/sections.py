# SPDX-License-Identifier: Apache-2.0
"""Writes the sections of a report that hypotheses, noise rates and tuning fill."""

import math

import pandas as pd

from verl_dvpo.bench.common import markdown_table
from verl_dvpo.bench.study.contrasts import contrasts_table, expectation
from verl_dvpo.bench.study.frozen import facts_of
from verl_dvpo.bench.study.results import FNR, FPR, YOUDEN_J, Results
from verl_dvpo.bench.study.stopping import hours, records_of


def contrasts(results: Results) -> pd.DataFrame:
    """Returns the table of contrasts; empty without hypotheses."""
    hypotheses = results.study.hypotheses
    return pd.DataFrame() if hypotheses is None else contrasts_table(hypotheses, results.standings)


def contrast_lines(results: Results, table: pd.DataFrame) -> list[str]:
    """Returns the section of the contrasts; empty without hypotheses.

    Args:
        results: of the study.
        table: as ``contrasts`` returns it.
    """
    hypotheses = results.study.hypotheses
    if hypotheses is None:
        return []
    rule, verdict = hypotheses.stopping, hypotheses.verdict
    budget = "no budget" if rule.budget_hours is None else f"a budget of {rule.budget_hours:g} hours"
    spent = hours(records_of(results.study))
    test = (
        "" if verdict.by == "interval" else f", and p is at most {verdict.alpha:g} (primary: after Holm's correction)"
    )
    lines = [
        "## Contrasts",
        "",
        f"{_origin(results)} Seeds are added to a contrast until the half-width of its 95 % t interval is at most its "
        f"bound: at least {rule.min_seeds} pairs, at most {rule.max_seeds} seeds, {budget}; {spent:.1f} hours are "
        "spent. The difference is treatment minus control, mean over paired seeds. p is that of the exact two-sided "
        f"sign-flip test; Holm's correction is over the {len(hypotheses.primary)} primary contrasts, the others are "
        f"exploratory. A contrast is supported or contradicted if its interval lies on one side of 0{test}; otherwise "
        "it is undecided. One that is open has no verdict yet.",
        "",
    ]
    headings = ["contrast", "expected", "observed", "seeds", "half-width / bound", "p", "p (Holm)", "state", "verdict"]
    rows = [
        [
            f"{'**' if row['primary'] else ''}{row['contrast']}{'**' if row['primary'] else ''}",
            expectation(contrast),
            _interval(row),
            row["seeds"],
            f"{_number(row['half_width'])} / {row['bound']:.3f}",
            _number(row["p_value"]),
            _number(row["p_corrected"]),
            row["state"],
            row["verdict"],
        ]
        for (_, row), contrast in zip(table.iterrows(), hypotheses.contrasts, strict=True)
    ]
    lines += [*markdown_table(headings, rows), "Primary contrasts are bold. What each expects:", ""]
    for contrast in hypotheses.contrasts:
        last = f", mean of the last {contrast.last_validations} validations" if contrast.last_validations > 1 else ""
        lines.append(
            f"- {contrast.name}: {contrast.sentence} (`{contrast.treatment}` against `{contrast.control}`; noise "
            f"{', '.join(contrast.noises)}; {', '.join(contrast.tasks)}{last})"
        )
    return [*lines, ""]


def noise_rates(results: Results) -> pd.DataFrame:
    """Returns the error rates of each noise as they were in training: means over steps, then over runs.

    Columns: noise, task, runs, FPR, FNR and J = TPR - FPR; NaN where no reward is binary. Clean rewards have 0, 0, 1.
    """
    steps = results.training
    keys = ["task", "noise", "kind"]
    of_runs = steps.groupby([*keys, "algorithm", "seed"], sort=False)[[FPR, FNR, YOUDEN_J]].mean().reset_index()
    rows = []
    for (task, noise, kind), cell in of_runs.groupby(keys, sort=False):
        means = cell[[FPR, FNR, YOUDEN_J]].mean()
        if kind == "none" and means.isna().all():
            means = pd.Series({FPR: 0.0, FNR: 0.0, YOUDEN_J: 1.0})
        rows.append({"task": task, "noise": noise, "runs": len(cell), **means})
    return pd.DataFrame(rows)


def noise_lines(table: pd.DataFrame) -> list[str]:
    """Returns the section of the noises; empty where there is none but clean rewards."""
    if table.empty or set(table["noise"]) == {"none"}:
        return []
    rows = [[*row[:3], *map(_number, row[3:])] for row in table.itertuples(index=False, name=None)]
    return [
        "## Noise",
        "",
        "As counted in training over right and wrong responses, before any correction: the share of wrong responses "
        "that pass (FPR), of right ones that fail (FNR), and Youden's J = TPR - FPR, 1 for clean rewards and 0 for "
        "rewards that say nothing. Means over steps, then over runs.",
        "",
        *markdown_table(["task", "noise", "runs", "FPR", "FNR", "J"], rows),
    ]


def tuning_lines(results: Results) -> list[str]:
    """Returns the section on tuning; empty for a study that says nothing of it."""
    study = results.study
    if not study.tuning:
        return []
    numbers = {study.tuning[each.name].settings if each.name in study.tuning else 1 for each in study.algorithms}
    rows = [
        [f"`{name}`", study.tuning[name].settings, study.tuning[name].how]
        if name in study.tuning
        else [f"`{name}`", 1, "as it ships"]
        for name in (each.name for each in study.algorithms)
    ]
    equal = "the same number of settings was" if len(numbers) == 1 else "**different numbers of settings were**"
    return [
        "## Tuning",
        "",
        f"For each algorithm {equal} tried before the study; 1 is an algorithm as it ships.",
        "",
        *markdown_table(["algorithm", "settings", "how"], rows),
    ]


def _origin(results: Results) -> str:
    facts = facts_of(results.study.out)
    if facts is None:
        return "The hypotheses are not frozen."
    digest, source = facts["sha256"]["hypotheses.yaml"], facts["hypotheses"]
    if source["committed"]:
        where = f"committed as of {source['commit']}"
    else:
        where = "**which no commit of its repository held as it was**"
    return (
        f"Written before the first run: `{source['file']}`, {where}, frozen {facts['frozen']}, sha256 `{digest[:16]}`."
    )


def _interval(row: pd.Series) -> str:
    if math.isnan(row["difference"]):
        return ""
    text = f"{row['difference']:+.3f}"
    if math.isnan(row["difference_low"]):
        return text
    return f"{text} [{row['difference_low']:+.3f}, {row['difference_high']:+.3f}]"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"
