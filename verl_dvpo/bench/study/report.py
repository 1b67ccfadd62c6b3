# SPDX-License-Identifier: Apache-2.0
"""``verl-dvpo study report DIR``: Markdown tables, CSV and figures in ``DIR/report``.

Nothing in it depends on when or in how many pieces the study ran, but ``runs.csv``, which has wall times and versions.
"""

import dataclasses
import json
import math
from pathlib import Path

import pandas as pd

from verl_dvpo.bench.study import figures
from verl_dvpo.bench.study.results import Results, load_results
from verl_dvpo.bench.study.summary import ALL, by_source, curves, summarise, training


def write_report(folder: str | Path, out: str | Path | None = None, *, reference: str | None = None) -> Path:
    """Writes the report on the study in `folder` and returns its folder, ``<folder>/report`` by default.

    Args:
        folder: of the study.
        out: where the report goes.
        reference: the algorithm that the others are compared with, in place of the study's own.

    Raises:
        ValueError: there is no study with a finished run, or the study has no such reference.
    """
    results = load_results(folder)
    if reference is not None:
        results = dataclasses.replace(results, study=results.study.changed(reference=reference))
    out = Path(out) if out is not None else Path(folder) / "report"
    out.mkdir(parents=True, exist_ok=True)
    summary = summarise(results)
    summary.to_csv(out / "summary.csv", index=False)
    curves(results).to_csv(out / "curves.csv", index=False)
    training(results).to_csv(out / "training.csv", index=False)
    runs_table(results).to_csv(out / "runs.csv", index=False)
    drawn = figures.draw(results, out)
    (out / "report.md").write_text(_markdown(results, summary, drawn))
    return out


def runs_table(results: Results) -> pd.DataFrame:
    """One row for each run that has ended, with what it took and what made it."""
    rows = []
    for record in results.finished + results.failed:
        versions = {f"version_{name}": version for name, version in record["versions"].items()}
        fixed = ("name", "status", "algorithm", "noise", "task", "seed", "score", "wall_seconds", "started", "error")
        rows.append({name: record[name] for name in fixed} | versions)
    return pd.DataFrame(rows)


def _markdown(results: Results, summary: pd.DataFrame, drawn: list[Path]) -> str:
    study = results.study
    total = len(results.finished) + len(results.failed) + len(results.missing)
    lines = [
        f"# Study {study.name}",
        "",
        f"{len(study.algorithms)} algorithms, {len(study.noises)} noises, {len(study.tasks)} tasks, "
        f"{len(study.seeds)} seeds, {study.steps} steps each: {len(results.finished)} of {total} runs finished, "
        f"{len(results.failed)} failed, {len(results.missing)} to come.",
        "",
        "Scores are those of the last step's validation, which is never corrupted. IQM is the interquartile mean over "
        "runs. The difference is the run with the same seed less that of "
        f"`{study.reference}`, P the probability that a run scores above one of `{study.reference}`. In brackets: "
        "95 % stratified bootstrap intervals over seeds, which know no other runs than these: with three seeds in one "
        "condition they reach from the lowest run to the highest.",
        "",
    ]
    made_by = {json.dumps(record["versions"], sort_keys=True) for record in results.finished}
    if len(made_by) > 1:
        lines += [f"**The runs were made by {len(made_by)} different versions of the software: see runs.csv.**", ""]
    for domain, title in (("in", "In-domain scores"), ("out", "Out-of-domain scores")):
        side = summary[summary["domain"] == domain]
        if side.empty:
            continue
        lines += [f"## {title}", ""]
        for (task, noise), cell in side.groupby(["task", "noise"], sort=False):
            lines += [f"### {'All tasks and noises' if task == ALL else f'{task}, noise {noise}'}", ""]
            lines += [f"| algorithm | runs | IQM | difference from {study.reference} | P |", "| --- " * 5 + "|"]
            lines += [_summary_row(row) for _, row in cell.iterrows()] + [""]
    lines += ["## Final score by data source (IQM)", "", *_table(by_source(results)), ""]
    lines += ["## The second half of training", ""]
    lines += [
        "Means over its steps, IQM over seeds; rewards are those of sampled answers. Explained variance is that of "
    ]
    lines += ["the returns, noise included, by the critic's values.", "", *_table(training(results)), ""]
    if drawn:
        lines += ["## Figures", ""]
        for path in drawn:
            lines += [f"![{path.stem}]({path.name})", ""]
    if results.failed or results.missing:
        lines += ["## Runs that are not in these numbers", ""]
        lines += [f"- `{each['name']}` failed: {_short(each['error'])}" for each in results.failed]
        lines += [f"- `{name}` has not ended" for name in results.missing] + [""]
    return "\n".join(lines)


def _summary_row(row: pd.Series) -> str:
    cells = [f"`{row['algorithm']}`", str(row["runs"]), _interval(row, "iqm", "{:.3f}")]
    cells += [_interval(row, "difference", "{:+.3f}"), _interval(row, "probability", "{:.2f}")]
    return "| " + " | ".join(cells) + " |"


def _interval(row: pd.Series, name: str, form: str) -> str:
    value, low, high = (row.get(f"{name}{end}", math.nan) for end in ("", "_low", "_high"))
    if math.isnan(value):
        return ""
    text = form.format(value)
    return text if math.isnan(low) else f"{text} [{form.format(low)}, {form.format(high)}]"


def _table(frame: pd.DataFrame) -> list[str]:
    def cell(value: object) -> str:
        if isinstance(value, float):
            return "" if math.isnan(value) else f"{value:.3f}"
        return str(value)

    head = ["| " + " | ".join(map(str, frame.columns)) + " |", "| --- " * len(frame.columns) + "|"]
    return head + ["| " + " | ".join(map(cell, row)) + " |" for row in frame.itertuples(index=False)]


def _short(error: str) -> str:
    return error.strip().splitlines()[-1][:300]
