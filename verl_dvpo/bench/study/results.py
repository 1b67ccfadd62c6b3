# SPDX-License-Identifier: Apache-2.0
"""Reads the results of a study from its folder: which runs have finished, and their metrics as tables."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from verl_dvpo.bench.study.config import Study, parse_study
from verl_dvpo.bench.study.plan import FINISHED, Run, plan
from verl_dvpo.bench.study.stopping import Standing, needed, records_of, standings
from verl_dvpo.records import read_metrics, scores
from verl_dvpo.saved.files import read_json

RUN_COLUMNS = ["algorithm", "noise", "kind", "rate", "task", "seed"]
COLUMNS = [*RUN_COLUMNS, "step", "source", "in_domain", "score"]
REWARD, CLEAN_REWARD, EXPLAINED = "reward", "clean reward", "explained variance"
FPR, FNR, YOUDEN_J = "FPR", "FNR", "J"
#: Metric of a training step -> its name in the report.
TRAINING = {
    "critic/score/mean": REWARD,
    "noise/clean_score/mean": CLEAN_REWARD,
    "critic/vf_explained_var": EXPLAINED,
    "noise/fpr": FPR,
    "noise/fnr": FNR,
    "noise/youden_j": YOUDEN_J,
}


@dataclass(frozen=True)
class Results:
    """The results that a study has so far.

    Attributes:
        study: the study.
        table: one row for each finished run, step of validation and data source, with ``COLUMNS``.
        training: one row for each finished run and step of training: ``RUN_COLUMNS``, step, the names in ``TRAINING``;
            NaN where a run has no such metric.
        finished: records of the finished runs.
        failed: records of the failed ones.
        missing: names of the runs that are needed and have not ended.
        standings: where each contrast of the hypotheses stands; none without hypotheses.
    """

    study: Study
    table: pd.DataFrame
    training: pd.DataFrame
    finished: list[dict[str, Any]]
    failed: list[dict[str, Any]]
    missing: list[str]
    standings: list[Standing] = field(default_factory=list)

    def final(self) -> pd.DataFrame:
        """Returns the rows of each run's last step."""
        return self.table[self.table["step"] == self.study.steps]


def load_results(folder: str | Path) -> Results:
    """Reads the study in ``folder``, which may have been moved since it ran.

    Raises:
        ValueError: there is no study, or none of its runs is finished.
    """
    folder = Path(folder).absolute()
    study = study_in(folder)
    rows: list[tuple[Any, ...]] = []
    steps: list[tuple[Any, ...]] = []
    finished, failed = [], []
    records_by_run = records_of(study)
    missing = [run.name for run in needed(study, records_by_run)]
    for run in plan(study):
        record = records_by_run[run.name]
        if record is None:
            continue
        if record["status"] != FINISHED:
            failed.append(dict(record))
        else:
            finished.append(dict(record))
            records = read_metrics(run.metrics)
            rows += _rows(run, records)
            steps += _steps(run, records)
    if not finished:
        raise ValueError(
            f"folder is {str(folder)!r}; a report needs a finished run, of this study {len(failed)} failed and "
            f"{len(missing)} are to come; run it first"
        )
    training = pd.DataFrame(steps, columns=[*RUN_COLUMNS, "step", *TRAINING.values()])
    table = pd.DataFrame(rows, columns=COLUMNS)
    return Results(study, table, training, finished, failed, missing, standings(study, records_by_run))


def study_in(folder: str | Path) -> Study:
    """Returns the study in ``folder``, which may have been moved since it ran.

    Raises:
        ValueError: there is no study.
    """
    folder = Path(folder).absolute()
    if not (folder / "study.json").is_file():
        raise ValueError(f"folder is {str(folder)!r}; the folder of a study has a study.json; choose another folder")
    return parse_study({**read_json(folder / "study.json"), "out": str(folder)})


def _axes(run: Run) -> tuple[Any, ...]:
    return (run.algorithm.name, run.noise.name, run.noise.kind, run.noise.rate, run.task.name, run.seed)


def _rows(run: Run, records: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [
        (*_axes(run), record["step"], source, source in run.task.in_domain, score)
        for record in records
        for source, score in scores(record).items()
    ]


def _steps(run: Run, records: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [
        (*_axes(run), record["step"], *(float(record["data"].get(name, math.nan)) for name in TRAINING))
        for record in records
        if next(iter(TRAINING)) in record["data"]
    ]
