# SPDX-License-Identifier: Apache-2.0
"""Computes the numbers of a study's report: final scores, curves and the course of training, over seeds.

A seed is the unit of repetition: over several cells (task, noise) the scores of each seed are averaged first.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from verl_dvpo.bench.statistics import Estimate, sign_flip_test, t_interval
from verl_dvpo.bench.study.results import CLEAN_REWARD, EXPLAINED, REWARD, Results
from verl_dvpo.bench.study.statistics import FEWEST, interquartile_mean, paired_difference, probability_of_improvement

ALL = "all"
#: Name in the tables -> whether its data sources belong to the trained domain.
DOMAINS = {"in": True, "out": False}
CELL = ["task", "noise"]


def run_scores(table: pd.DataFrame) -> pd.DataFrame:
    """Returns one row for each run, step and side of the domain: the mean score over that side's data sources."""
    keys = ["algorithm", "noise", "kind", "rate", "task", "seed", "step", "in_domain"]
    return table.groupby(keys, dropna=False, sort=False)["score"].mean().reset_index()


def summarise(results: Results) -> pd.DataFrame:
    """Returns final scores: one row for each algorithm, side of the domain and cell (task, noise), and all cells.

    Columns: domain, task, noise, algorithm, runs, and, each estimate with ``_low`` and ``_high`` at 95 %:

    - ``mean`` over seeds, t interval;
    - ``iqm`` over runs, bootstrap; with four runs or more;
    - ``difference`` from the reference, mean over paired seeds, t interval; ``p_value`` of its exact sign-flip test;
    - ``difference_iqm``, bootstrap; with four pairs or more;
    - ``probability`` that a run scores above one of the reference, bootstrap; with two pairs or more in each cell.

    Comparisons use the seeds that both algorithms have finished.
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
    """Returns the final scores of an algorithm in one cell, indexed by seed."""
    chosen = side[(side["algorithm"] == algorithm) & (side["task"] == cell[0]) & (side["noise"] == cell[1])]
    return chosen.set_index("seed")["score"].sort_index()


def _row(side: pd.DataFrame, algorithm: str, reference: str, group: list[tuple[str, str]]) -> dict:
    strata = [seeds_of(side, algorithm, cell) for cell in group]
    if any(scores.empty for scores in strata):
        return {}  # without one of the cells the average over all would be of something else
    runs = sum(map(len, strata))
    row = {"algorithm": algorithm, "runs": runs} | _columns("mean", t_interval(_by_seed(strata)))
    if runs >= FEWEST:
        row |= _columns("iqm", interquartile_mean([scores.to_numpy() for scores in strata]))
    if algorithm == reference:
        return row
    return row | _comparison(strata, [seeds_of(side, reference, cell) for cell in group])


def _comparison(strata: Sequence[pd.Series], others: Sequence[pd.Series]) -> dict:
    common = [mine.index.intersection(theirs.index) for mine, theirs in zip(strata, others, strict=True)]
    if any(seeds.empty for seeds in common):
        return {}
    mine = [scores[seeds] for scores, seeds in zip(strata, common, strict=True)]
    theirs = [scores[seeds] for scores, seeds in zip(others, common, strict=True)]
    differences = _by_seed([a - b for a, b in zip(mine, theirs, strict=True)])
    row = _columns("difference", t_interval(differences)) | {"p_value": sign_flip_test(differences)}
    arrays = [scores.to_numpy() for scores in mine], [scores.to_numpy() for scores in theirs]
    if sum(map(len, common)) >= FEWEST:
        row |= _columns("difference_iqm", paired_difference(*arrays))
    if all(len(seeds) > 1 for seeds in common):  # one pair is won or lost, which is no probability
        row |= _columns("probability", probability_of_improvement(*arrays))
    return row


def _by_seed(strata: Sequence[pd.Series]) -> np.ndarray:
    """Returns the mean over strata of each seed that all of them have."""
    return pd.concat(strata, axis=1, join="inner").mean(axis=1).to_numpy()


def curves(results: Results, *, in_domain: bool = True) -> pd.DataFrame:
    """Returns learning curves: task, noise, algorithm, step, runs, and ``mean`` with its t interval over seeds."""
    scores = run_scores(results.table)
    scores = scores[scores["in_domain"] == in_domain]
    rows = []
    for (task, noise, algorithm, step), group in scores.groupby([*CELL, "algorithm", "step"], sort=False):
        estimate = t_interval(group["score"].to_numpy())
        row = {"task": task, "noise": noise, "algorithm": algorithm, "step": step, "runs": len(group)}
        rows.append(row | _columns("mean", estimate))
    return pd.DataFrame(rows).sort_values([*CELL, "algorithm", "step"]).reset_index(drop=True)


def by_source(results: Results) -> pd.DataFrame:
    """Returns the final score of each data source, the mean over seeds: rows (task, noise, algorithm)."""
    final = results.final()
    wide = final.pivot_table(index=[*CELL, "algorithm"], columns="source", values="score", aggfunc="mean", sort=False)
    # sources of the trained domain first, each side in alphabetical order
    inside = final.groupby("source")["in_domain"].any()
    return _in_order(wide[sorted(inside.index, key=lambda source: (not inside[source], source))], results)


def training(results: Results) -> pd.DataFrame:
    """Returns means over the second half of training, then over seeds: rows (task, noise, algorithm).

    Columns: the reward that was trained on, the reward without its noise (both of sampled answers), and verl's
    ``critic/vf_explained_var``: the share of the variance of scalar GAE returns, noise included, that the critic's
    values explain; NaN without a critic.
    """
    steps = results.training
    late = steps[steps["step"] > results.study.steps / 2]
    late = late.assign(**{CLEAN_REWARD: late[CLEAN_REWARD].fillna(late[REWARD])})
    keys = [*CELL, "algorithm"]
    of_runs = late.groupby([*keys, "seed"], sort=False)[[REWARD, CLEAN_REWARD, EXPLAINED]].mean()
    return _in_order(of_runs.groupby(keys, sort=False).mean(), results)


def _in_order(wide: pd.DataFrame, results: Results) -> pd.DataFrame:
    """Sorts rows in the order of the study's tasks, noises and algorithms."""
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
