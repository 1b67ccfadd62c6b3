# SPDX-License-Identifier: Apache-2.0
"""Reads from studies how an algorithm with a critic and one without did on clean rewards, seed by seed."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from verl_dvpo.bench.study.config import CLEAN
from verl_dvpo.bench.study.results import load_results

COLUMNS = ["task", "study", "seed", "with_critic", "without_critic", "difference"]


def compare(folders: Sequence[Path], *, with_critic: str, without_critic: str) -> pd.DataFrame:
    """Pairs the last validation scores of two algorithms by study and seed, on clean rewards in the trained domain.

    Args:
        folders: of studies; at least one.
        with_critic: an algorithm's name in the studies.
        without_critic: the other's.

    Returns:
        One pair a row, with ``COLUMNS``; a task is the data source of a validation, and scores are accuracies in
        [0, 1].

    Raises:
        ValueError: a folder is not one of a study with a finished run, or no study has a pair.
    """
    rows = []
    for folder in folders:
        results = load_results(folder)
        final = results.final()
        clean = final[(final["kind"] == CLEAN) & final["in_domain"]]
        for (task, _), runs in clean.groupby(["source", "task"], sort=False):
            one, other = (
                runs[runs["algorithm"] == name].set_index("seed")["score"] for name in (with_critic, without_critic)
            )
            rows += [
                (task, results.study.name, seed, one[seed], other[seed], one[seed] - other[seed])
                for seed in sorted(one.index.intersection(other.index))
            ]
    if not rows:
        raise ValueError(
            f"study is {[str(folder) for folder in folders]}; one with finished clean runs of {with_critic} and "
            f"{without_critic} that share a seed is allowed; name another one, or run it further"
        )
    return pd.DataFrame(rows, columns=COLUMNS)
