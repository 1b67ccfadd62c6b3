# SPDX-License-Identifier: Apache-2.0
"""Tells how far a study is: its runs, its hours, and where each contrast stands."""

import math
from pathlib import Path

from verl_dvpo.bench.common import markdown_table
from verl_dvpo.bench.study.plan import FAILED, FINISHED, plan
from verl_dvpo.bench.study.results import study_in
from verl_dvpo.bench.study.stopping import Standing, hours, needed, records_of, standings


def status(folder: str | Path) -> str:
    """Returns the status of the study in ``folder`` as text.

    Raises:
        ValueError: there is no study.
    """
    study = study_in(folder)
    records = records_of(study)
    ended = [record["status"] for record in records.values() if record is not None]
    due = needed(study, records)
    most = "" if study.hypotheses is None else "at most "
    lines = [
        f"{study.name}: {most}{len(plan(study))} runs; {ended.count(FINISHED)} finished, {ended.count(FAILED)} failed, "
        f"{len(due)} needed now; {hours(records):.1f} hours of runs",
        "",
    ]
    found = standings(study, records)
    if found:
        headings = ["contrast", "seeds", "difference", "95 % interval", "half-width", "bound", "state"]
        lines += markdown_table(headings, map(_row, found))
    if due:
        lines.append(f"next: {due[0].name}")
    return "\n".join(lines)


def _row(standing: Standing) -> list[object]:
    estimate = standing.estimate
    has_interval = not math.isnan(estimate.low)
    return [
        standing.contrast.name,
        len(standing.seeds),
        f"{estimate.value:+.4f}" if standing.seeds else "",
        f"[{estimate.low:+.4f}, {estimate.high:+.4f}]" if has_interval else "",
        f"{standing.half_width:.4f}" if has_interval else "",
        f"{standing.contrast.bound:.4f}",
        str(standing.state),
    ]
