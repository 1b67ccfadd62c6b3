# SPDX-License-Identifier: Apache-2.0
"""The report's numbers: final scores, aggregated over seeds and over whole groups of conditions."""

from collections.abc import Callable

import pandas as pd

from verl_dvpo.bench.study.results import CLEAN_REWARD, EXPLAINED, REWARD, Results
from verl_dvpo.bench.study.statistics import (
    Estimate,
    interquartile_mean,
    paired_difference,
    probability_of_improvement,
    trimmed_mean,
)

ALL = "all"
#: Name in the tables -> whether it is about the trained domain.
DOMAINS = {"in": True, "out": False}
CELL = ["task", "noise"]


def run_scores(table: pd.DataFrame) -> pd.DataFrame:
    """One row a run, step and side of the domain: the mean score over that side's data sources."""
    keys = ["algorithm", "noise", "kind", "rate", "task", "seed", "step", "in_domain"]
    return table.groupby(keys, dropna=False, sort=False)["score"].mean().reset_index()


def summarise(results: Results) -> pd.DataFrame:
    """The final scores: one row for each algorithm, side of the domain and cell (task, noise), and for all cells.

    Columns: domain, task, noise, algorithm, runs, ``iqm``, ``difference`` from the reference, ``probability`` of an
    improvement on it, each with ``_low`` and ``_high``. What compares uses the seeds that both have finished.
    """
    final = run_scores(results.final())
    rows = []
    for domain, is_in in DOMAINS.items():
        side = final[final["in_domain"] == is_in]
        cells = [cell for cell, _ in side.groupby(CELL, sort=False)]
        groups = [[cell] for cell in cells] + ([cells] if len(cells) > 1 else [])
        for group in groups:
            name = group[0] if len(group) == 1 else (ALL, ALL)
            for algorithm in results.study.algorithms:
                row = _row(side, algorithm.name, results.study.reference, group)
                if row:
                    rows.append({"domain": domain, "task": name[0], "noise": name[1], **row})
    return pd.DataFrame(rows)


def seeds_of(side: pd.DataFrame, algorithm: str, cell: tuple[str, str]) -> pd.Series:
    """Seed -> final score."""
    chosen = side[(side["algorithm"] == algorithm) & (side["task"] == cell[0]) & (side["noise"] == cell[1])]
    return chosen.set_index("seed")["score"].sort_index()


def _row(side: pd.DataFrame, algorithm: str, reference: str, group: list[tuple[str, str]]) -> dict:
    strata = [seeds_of(side, algorithm, cell) for cell in group]
    if any(scores.empty for scores in strata):
        return {}  # over all cells one that is missing would change what is averaged
    row = {"algorithm": algorithm, "runs": sum(map(len, strata))}
    row |= _columns("iqm", interquartile_mean([scores.to_numpy() for scores in strata]))
    others = [seeds_of(side, reference, cell) for cell in group]
    common = [mine.index.intersection(theirs.index) for mine, theirs in zip(strata, others, strict=True)]
    if algorithm == reference or any(seeds.empty for seeds in common):
        return row
    mine = [scores[seeds].to_numpy() for scores, seeds in zip(strata, common, strict=True)]
    theirs = [scores[seeds].to_numpy() for scores, seeds in zip(others, common, strict=True)]
    compare: dict[str, Callable[..., Estimate]] = {"difference": paired_difference}
    if all(len(seeds) > 1 for seeds in common):  # one pair is won or lost, which is no probability
        compare["probability"] = probability_of_improvement
    for name, function in compare.items():
        row |= _columns(name, function(mine, theirs))
    return row


def curves(results: Results, *, in_domain: bool = True) -> pd.DataFrame:
    """Learning curves: task, noise, algorithm, step, runs, ``iqm`` with its interval over seeds."""
    scores = run_scores(results.table)
    scores = scores[scores["in_domain"] == in_domain]
    rows = []
    for (task, noise, algorithm, step), group in scores.groupby([*CELL, "algorithm", "step"], sort=False):
        estimate = interquartile_mean([group["score"].to_numpy()])
        row = {"task": task, "noise": noise, "algorithm": algorithm, "step": step, "runs": len(group)}
        rows.append(row | _columns("iqm", estimate))
    return pd.DataFrame(rows).sort_values([*CELL, "algorithm", "step"]).reset_index(drop=True)


def by_source(results: Results) -> pd.DataFrame:
    """Final score by data source, the interquartile mean over seeds: rows (task, noise, algorithm)."""
    final = results.final()
    wide = final.pivot_table(index=[*CELL, "algorithm"], columns="source", values="score", aggfunc=_iqm, sort=False)
    # in the domain first; verl logs them as they come
    inside = final.groupby("source")["in_domain"].any()
    return _in_order(wide[sorted(inside.index, key=lambda source: (not inside[source], source))], results)


def training(results: Results) -> pd.DataFrame:
    """What the second half of training was like: rows (task, noise, algorithm), means over steps, then over seeds.

    Columns: the reward that was trained on, the reward without its noise, and the share of the returns' variance that
    the critic explains (noise included; NaN without a critic). A step's reward is that of samples, not of greedy
    answers.
    """
    steps = results.training
    late = steps[steps["step"] > results.study.steps / 2]
    late = late.assign(**{CLEAN_REWARD: late[CLEAN_REWARD].fillna(late[REWARD])})
    keys = [*CELL, "algorithm"]
    of_runs = late.groupby([*keys, "seed"], sort=False)[[REWARD, CLEAN_REWARD, EXPLAINED]].mean()
    return _in_order(of_runs.groupby(keys, sort=False).agg(_iqm), results)


def _iqm(scores: pd.Series) -> float:
    return float(trimmed_mean(scores.to_numpy(dtype=float)))


def _in_order(wide: pd.DataFrame, results: Results) -> pd.DataFrame:
    """Rows as the study has its tasks, noises and algorithms."""
    study = results.study
    places = {
        "task": {task.name: place for place, task in enumerate(study.tasks)},
        "noise": {noise.name: place for place, noise in enumerate(study.noises)},
        "algorithm": {algorithm.name: place for place, algorithm in enumerate(study.algorithms)},
    }
    flat = wide.reset_index()
    flat.columns.name = None
    return flat.sort_values([*places], key=lambda names: names.map(places[names.name])).reset_index(drop=True)


def _columns(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
