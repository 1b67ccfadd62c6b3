# SPDX-License-Identifier: Apache-2.0
"""Writes a study's report: Markdown tables, CSV files and figures.

Only ``runs.csv`` depends on when the study ran and in how many pieces: it has wall times and versions.
"""

import dataclasses
import json
import math
from pathlib import Path

import pandas as pd

from verl_dvpo.bench.common import markdown_table, write_csv, write_text
from verl_dvpo.bench.study import figures
from verl_dvpo.bench.study.heads import heads_note
from verl_dvpo.bench.study.results import CLEAN_REWARD, EXPLAINED, FNR, FPR, REWARD, YOUDEN_J, Results, load_results
from verl_dvpo.bench.study.runner import last_line
from verl_dvpo.bench.study.sections import contrast_lines, contrasts, noise_lines, noise_rates, tuning_lines
from verl_dvpo.bench.study.summary import ALL, by_source, curves, summarise, training


def write_report(folder: str | Path, out: str | Path | None = None, *, reference: str | None = None) -> Path:
    """Writes the report of a study and returns the folder of the report.

    Args:
        folder: folder of the study.
        out: folder of the report; ``<folder>/report`` by default.
        reference: algorithm to compare the others with, in place of the study's own.

    Raises:
        ValueError: there is no study with a finished run, or the study has no such reference.
    """
    results = load_results(folder)
    if reference is not None:
        results = dataclasses.replace(results, study=results.study.changed(reference=reference))
    out = Path(out) if out is not None else Path(folder) / "report"
    out.mkdir(parents=True, exist_ok=True)
    summary = summarise(results)
    write_csv(out / "summary.csv", summary)
    write_csv(out / "curves.csv", curves(results))
    write_csv(out / "training.csv", training(results))
    write_csv(out / "runs.csv", runs_table(results))
    write_csv(out / "validations.csv", results.table.drop(columns=["kind", "rate"]))
    rates = noise_rates(results)
    write_csv(out / "noise.csv", rates)
    compared = contrasts(results)
    if len(compared):
        write_csv(out / "contrasts.csv", compared)
    drawn = figures.draw(results, out, compared)
    before = [*contrast_lines(results, compared), *noise_lines(rates), *tuning_lines(results)]
    write_text(out / "report.md", _markdown(results, summary, drawn, before))
    return out


def runs_table(results: Results) -> pd.DataFrame:
    """Returns one row for each run that has ended: its score, times, means over training, and versions.

    Means are over the second half of training, as in ``summary.training``; those of noise over all of it.
    """
    steps = results.training
    keys = ["algorithm", "noise", "task", "seed"]
    late = steps[steps["step"] > results.study.steps / 2].groupby(keys)[[REWARD, CLEAN_REWARD, EXPLAINED]].mean()
    means = late.join(steps.groupby(keys)[[FPR, FNR, YOUDEN_J]].mean(), how="outer")
    means.columns = [name.replace(" ", "_") for name in means.columns]
    rows = []
    for record in results.finished + results.failed:
        versions = {f"version_{name}": version for name, version in record["versions"].items()}
        fixed = {name: record[name] for name in ("name", "status", *keys, "score", "wall_seconds", "started")}
        fixed |= {"cpu_seconds": record.get("cpu_seconds")}  # of runs that recorded them
        fixed |= {"error": last_line(record["error"]) if record["error"] else None}
        rows.append(fixed | versions)
    return pd.DataFrame(rows).merge(means.reset_index(), on=keys, how="left")


def _markdown(results: Results, summary: pd.DataFrame, drawn: list[Path], before: list[str]) -> str:
    lines = [*_head(results), *before, *_score_sections(results, summary)]
    lines += ["## Final score by data source (mean over seeds)", "", *_frame(by_source(results))]
    lines += [
        "## The second half of training",
        "",
        "Means over its steps, then over seeds; rewards are those of sampled answers. Explained variance is verl's "
        "`critic/vf_explained_var`: the share of the variance of scalar GAE returns, noise included, that the critic's "
        "values explain. It is the same formula for all algorithms, and says nothing about clean rewards.",
        "",
        *_frame(training(results)),
    ]
    if drawn:
        lines += ["## Figures", ""]
        for path in drawn:
            lines += [f"![{path.stem}]({path.name})", ""]
    if results.failed or results.missing:
        lines += ["## Runs that are not in these numbers", ""]
        lines += [f"- `{each['name']}` failed: {last_line(each['error'])}" for each in results.failed]
        lines += [f"- `{name}` has not ended" for name in results.missing] + [""]
    return "\n".join(lines)


def _head(results: Results) -> list[str]:
    study = results.study
    total = len(results.finished) + len(results.failed) + len(results.missing)
    most = "" if study.hypotheses is None else "at most "
    lines = [
        f"# Study {study.name}",
        "",
        f"{len(study.algorithms)} algorithms, {len(study.noises)} noises, {len(study.tasks)} tasks, "
        f"{most}{len(study.seeds)} seeds, {study.steps} steps each: {len(results.finished)} of {total} runs finished, "
        f"{len(results.failed)} failed, {len(results.missing)} to come.",
        "",
        "Scores are those of the last step's validation, which is never corrupted. The difference is that of runs with "
        f"the same seed from `{study.reference}`; over all tasks and noises the scores of a seed are averaged first. "
        "Means are over seeds, with 95 % t intervals in brackets. p is the two-sided p-value of the exact test that "
        "flips the signs of the seeds' differences: with three seeds it cannot be below 0.25, with five below 0.0625; "
        "it is not corrected for the number of comparisons. IQM is the interquartile mean over four runs or more, and "
        f"P the probability that a run scores above one of `{study.reference}`, both with 95 % stratified bootstrap "
        "intervals, which know no other runs than these.",
        "",
    ]
    made_by = {json.dumps(record["versions"], sort_keys=True) for record in results.finished}
    if len(made_by) > 1:
        lines += [f"**The runs were made by {len(made_by)} different versions of the software: see runs.csv.**", ""]
    if note := heads_note(study):
        lines += [note, ""]
    return lines


def _score_sections(results: Results, summary: pd.DataFrame) -> list[str]:
    columns = {
        "mean": ("mean", "{:.3f}"),
        "difference": (f"difference from {results.study.reference}", "{:+.3f}"),
        "p_value": ("p", "{:.3f}"),
        "probability": ("P", "{:.2f}"),
        "iqm": ("IQM", "{:.3f}"),
        "difference_iqm": ("IQM of differences", "{:+.3f}"),
    }
    lines = []
    for domain, title in (("in", "In-domain scores"), ("out", "Out-of-domain scores")):
        side = summary[summary["domain"] == domain]
        if side.empty:
            continue
        lines += [f"## {title}", ""]
        for (task, noise), cell in side.groupby(["task", "noise"], sort=False):
            lines += [f"### {'All tasks and noises' if task == ALL else f'{task}, noise {noise}'}", ""]
            shown = {name: look for name, look in columns.items() if name in cell and cell[name].notna().any()}
            rows = [
                [
                    f"`{row['algorithm']}`",
                    row["runs"],
                    *(_interval(row, name, form) for name, (_, form) in shown.items()),
                ]
                for _, row in cell.iterrows()
            ]
            lines += markdown_table(["algorithm", "runs", *(heading for heading, _ in shown.values())], rows)
    return lines


def _interval(row: pd.Series, name: str, form: str) -> str:
    value, low, high = (row.get(f"{name}{end}", math.nan) for end in ("", "_low", "_high"))
    if math.isnan(value):
        return ""
    text = form.format(value)
    return text if math.isnan(low) else f"{text} [{form.format(low)}, {form.format(high)}]"


def _frame(frame: pd.DataFrame) -> list[str]:
    rows = frame.map(lambda cell: f"{cell:.3f}" if isinstance(cell, float) and not math.isnan(cell) else cell)
    return markdown_table(list(frame.columns), list(rows.itertuples(index=False, name=None)))
