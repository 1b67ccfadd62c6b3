# SPDX-License-Identifier: Apache-2.0
"""Writes the gate's report: tables, verdicts and a figure, from the two CSV files that measuring and comparing left."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from verl_dvpo.bench.common import markdown_table, write_csv, write_text
from verl_dvpo.bench.gate.figures import draw
from verl_dvpo.bench.gate.variance import ALL, BETWEEN, DEVIATION, FIRST, LENGTH, MEAN
from verl_dvpo.bench.gate.verdict import LEAST_EXPLAINED, OPEN, Verdict, judge, over_seeds
from verl_dvpo.bench.statistics import Estimate

REPORT, VARIANCE, COMPARISON, SETTINGS, FIGURE = (
    "report.md",
    "variance.csv",
    "comparison.csv",
    "settings.csv",
    "gate.png",
)


def read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Reads a table that an earlier call wrote; an empty one if there is none.

    Raises:
        ValueError: the file has other columns.
    """
    if not path.is_file():
        return pd.DataFrame(columns=list(columns))
    table = pd.read_csv(path, keep_default_na=True)
    if list(table.columns) != list(columns):
        raise ValueError(
            f"out has {str(path)!r} with the columns {list(table.columns)}; {list(columns)} is allowed; name another "
            "folder"
        )
    for name in ("critic", "study"):
        if name in table:
            table[name] = table[name].fillna("")
    return table


def replaced(old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """Returns ``old`` with all rows of the tasks in ``new`` replaced by its own."""
    kept = old[~old["task"].isin(set(new["task"]))]
    return new if kept.empty else kept if new.empty else pd.concat([kept, new], ignore_index=True)


def write_report(
    out: Path, *, settings: pd.DataFrame, measured: pd.DataFrame, compared: pd.DataFrame, algorithms: tuple[str, str]
) -> Path:
    """Writes tables, figure and report into ``out``, and returns the report's path.

    Args:
        out: a folder that exists.
        settings: how each task was measured.
        measured: of ``variance.measure``.
        compared: of ``comparison.compare``.
        algorithms: names of the algorithm with a critic and of that without.
    """
    write_csv(out / SETTINGS, settings)
    write_csv(out / VARIANCE, measured)
    write_csv(out / COMPARISON, compared)
    if not measured.empty:
        draw(measured, out / FIGURE)
    write_text(out / REPORT, markdown(settings, measured, compared, algorithms=algorithms))
    return out / REPORT


def markdown(
    settings: pd.DataFrame, measured: pd.DataFrame, compared: pd.DataFrame, *, algorithms: tuple[str, str]
) -> str:
    """Returns the report; arguments as for ``write_report``."""
    verdicts = judge(measured, compared)
    lines = [
        "# Gate: do critics matter on these tasks?",
        "",
        "Returns are Monte-Carlo returns of the warm-started policy on clean rewards. A task passes if the best critic",
        f"explains more than {LEAST_EXPLAINED:.0%} of their variance over all response tokens of held-out prompts, and",
        f"if `{algorithms[0]}` beats `{algorithms[1]}` on clean rewards; each by the whole 95 % t interval over seeds.",
        "",
        "## Verdicts",
        "",
        *(f"- {verdict_line(each, algorithms)}" for each in verdicts),
        "",
    ]
    if not measured.empty:
        lines += _explained_section(settings, measured, verdicts)
    if not compared.empty:
        lines += _comparison_section(compared, verdicts, algorithms)
    return "\n".join(lines).rstrip() + "\n"


def verdict_line(verdict: Verdict, algorithms: tuple[str, str]) -> str:
    """Says in one line whether a task passed, and by which figures."""
    if verdict.explained is None:
        first = "explained variance open: not measured"
    else:
        first = f"explained variance {verdict.variance}: `{verdict.critic}` {interval(verdict.explained)}"
    names = f"`{algorithms[0]}` against `{algorithms[1]}`"
    if verdict.difference is None:
        second = f"{names} {OPEN}: no study"
    else:
        second = f"{names} {verdict.algorithms}: {interval(verdict.difference, sign='+')}, {verdict.pairs} pairs"
    return f"`{verdict.task}` **{verdict.both}**; {first}; {second}"


def interval(estimate: Estimate, sign: str = "") -> str:
    """Returns ``value [low, high]`` with three decimals; without ends where there is no interval."""
    value = f"{estimate.value:{sign}.3f}"
    return value if estimate.low != estimate.low else f"{value} [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"


def _explained_section(settings: pd.DataFrame, measured: pd.DataFrame, verdicts: Sequence[Verdict]) -> list[str]:
    lines = [
        "## What critics explain",
        "",
        "Explained variance is 1 - Σ(R - V)²/Σ(R - mean of R)². The share between prompts, from several responses to",
        "each prompt, is the most that the value of a prompt can explain; later tokens can explain more, since a",
        "response decides its reward while it is written.",
        "",
    ]
    rows = []
    for verdict in verdicts:
        if verdict.explained is None:
            continue
        alone = {
            name: over_seeds(measured, verdict.task, name).get("", Estimate(float("nan"), float("nan"), float("nan")))
            for name in (BETWEEN, MEAN, DEVIATION, LENGTH)
        }
        first, everywhere = (over_seeds(measured, verdict.task, name) for name in (FIRST, ALL))
        for critic in everywhere:
            rows.append(
                (
                    f"`{verdict.task}`",
                    f"{alone[MEAN].value:.3f} ± {alone[DEVIATION].value:.3f}",
                    f"{alone[LENGTH].value:.1f}",
                    interval(alone[BETWEEN]),
                    f"`{critic}`",
                    interval(first[critic]),
                    interval(everywhere[critic]),
                )
            )
    headings = ("task", "reward", "tokens", "share between prompts", "critic of", "first token", "all tokens")
    lines += markdown_table(headings, rows)
    lines += [f"![explained variance by position]({FIGURE})", ""]
    lines += ["How it was measured:", ""]
    for task, group in settings.groupby("task", sort=False):
        said = "; ".join(f"{name} {value}" for name, value in zip(group["setting"], group["value"], strict=True))
        lines.append(f"- `{task}`: {said}")
    return [*lines, ""]


def _comparison_section(compared: pd.DataFrame, verdicts: Sequence[Verdict], algorithms: tuple[str, str]) -> list[str]:
    rows = []
    for verdict in verdicts:
        if verdict.difference is None:
            continue
        mine = compared[compared["task"] == verdict.task]
        studies = ", ".join(dict.fromkeys(str(name) for name in mine["study"]))
        means = [f"{mine[name].mean():.3f}" for name in ("with_critic", "without_critic")]
        rows.append((f"`{verdict.task}`", studies, verdict.pairs, *means, interval(verdict.difference, sign="+")))
    headings = ("task", "study", "pairs", f"`{algorithms[0]}`", f"`{algorithms[1]}`", "difference")
    return ["## With and without a critic, clean rewards", "", *markdown_table(headings, rows)]
