# SPDX-License-Identifier: Apache-2.0
"""Writes the report of a sweep: ``report.md``, ``points.csv``, ``runs.csv``, ``scores.png`` and ``scores.svg``."""

import math
from pathlib import Path

import numpy as np
import pandas as pd

from verl_dvpo.bench.common import markdown_table, write_csv, write_text
from verl_dvpo.bench.statistics import t_interval
from verl_dvpo.bench.sweep.figure import scores_figure, to_svg
from verl_dvpo.bench.sweep.read import SweptRun, Value, read_sweep, shown
from verl_dvpo.pictures.figure import to_png

#: Columns of ``points.csv`` behind those of what was swept.
NUMBERS = ["runs", "score", "sd", "low", "high"]


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Writes the report of the sweep in ``folder`` and returns the path of ``report.md``.

    Args:
        folder: of the sweep.
        out: folder of the report; ``<folder>/report`` by default.

    Raises:
        ValueError: there is no sweep, or none of its runs has ended with a score.
    """
    runs = read_sweep(folder)
    ended = [run for run in runs if run.score is not None]
    if not ended:
        raise ValueError(
            f"folder is '{folder}'; a report needs a run that has ended; run {runs[0].name} {runs[0].problem}"
        )
    out = folder / "report" if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    points = points_table(ended)
    write_csv(out / "points.csv", points)
    write_csv(out / "runs.csv", runs_table(runs))
    figure = scores_figure(ended)
    (out / "scores.png").write_bytes(to_png(figure))
    write_text(out / "scores.svg", to_svg(figure))
    write_text(out / "report.md", _markdown(folder, runs, points))
    return out / "report.md"


def points_table(runs: list[SweptRun]) -> pd.DataFrame:
    """Returns one row for each point: what was swept, its runs R, mean, standard deviation and 95 % t interval.

    One run has neither deviation nor interval. Points come in the order of their values.

    Args:
        runs: that have a score.
    """
    groups: dict[tuple[tuple[str, Value], ...], list[float]] = {}
    for run in runs:
        groups.setdefault(tuple(run.point.items()), []).append(float(run.score or 0.0))
    rows = []
    for point, scores in sorted(groups.items(), key=lambda item: [_order(value) for _, value in item[0]]):
        mean, low, high = t_interval(scores)
        spread = float(np.std(scores, ddof=1)) if len(scores) > 1 else math.nan
        rows.append({**dict(point), "runs": len(scores), "score": mean, "sd": spread, "low": low, "high": high})
    return pd.DataFrame(rows)


def runs_table(runs: list[SweptRun]) -> pd.DataFrame:
    """Returns one row for each run: what it was told, its last step, its score, and why it does not count."""
    return pd.DataFrame(
        [
            {"run": run.name, **run.point, **run.seed, "step": run.step, "score": run.score, "problem": run.problem}
            for run in runs
        ]
    )


def _order(value: Value) -> tuple[int, float, str]:
    return (1, 0.0, value) if isinstance(value, str) else (0, value, "")


def _markdown(folder: Path, runs: list[SweptRun], points: pd.DataFrame) -> str:
    fields = [name for name in points.columns if name not in NUMBERS]
    rows = [
        [
            *(shown(row[field]) for field in fields),
            int(row["runs"]),
            f"{row['score']:.4f}",
            None if math.isnan(row["sd"]) else f"{row['sd']:.4f}",
            None if math.isnan(row["low"]) else f"[{row['low']:.4f}, {row['high']:.4f}]",
        ]
        for _, row in points.iterrows()
    ]
    counted = sum(run.score is not None for run in runs)
    lines = [
        f"# Sweep {folder.name}",
        "",
        f"{counted} of {len(runs)} runs have ended. The score is that of a run's last validation, which is never "
        "corrupted: its mean over the seeds of a point, the standard deviation between them, and Student's 95 % "
        "interval.",
        "",
        *markdown_table([*(f"`{field}`" for field in fields), "runs", "score", "sd", "95 % interval"], rows),
        _best(points, fields),
        "",
        "![last scores over what was swept](scores.png)",
        "",
    ]
    left = [run for run in runs if run.score is None]
    if left:
        lines += ["## Runs that are not in these numbers", "", *(f"- {run.name} {run.problem}" for run in left), ""]
    return "\n".join(lines)


def _best(points: pd.DataFrame, fields: list[str]) -> str:
    """Says which point has the highest mean, and how much that is worth."""
    best = points.loc[points["score"].idxmax()]
    where = ", ".join(f"`{field}={shown(best[field])}`" for field in fields) or "the one point"
    if (points["runs"] < 2).all():
        worth = "Each point has one run: how far seeds alone spread is not known."
    else:
        worth = "It was chosen among all points, so its mean is likely too high."
    return f"The highest mean is {best['score']:.4f}, at {where}. {worth}"
