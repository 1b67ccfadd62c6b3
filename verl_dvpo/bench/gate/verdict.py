# SPDX-License-Identifier: Apache-2.0
"""Decides which tasks pass the gate."""

from dataclasses import dataclass

import pandas as pd

from verl_dvpo.bench.gate.variance import ALL
from verl_dvpo.bench.statistics import Estimate, t_interval

#: Share of the variance of returns, over all response tokens, that the best critic has to explain.
LEAST_EXPLAINED = 0.2
PASSED, FAILED, OPEN = "passed", "failed", "open"


@dataclass(frozen=True)
class Verdict:
    """The gate's verdict on one task.

    Attributes:
        task: its name.
        critic: the one that explains most over all tokens, by the mean over seeds; empty where none was measured.
        explained: what it explains, over seeds.
        difference: score of the algorithm with a critic minus that without, over pairs; None without a study.
        pairs: their number.
    """

    task: str
    critic: str
    explained: Estimate | None
    difference: Estimate | None
    pairs: int

    @property
    def variance(self) -> str:
        """``passed`` if the whole interval of the best critic's explained variance is above ``LEAST_EXPLAINED``."""
        if self.explained is None:
            return OPEN
        return _judge(self.explained, LEAST_EXPLAINED)

    @property
    def algorithms(self) -> str:
        """``passed`` if the whole interval of the difference is above 0; ``open`` without a study."""
        return OPEN if self.difference is None else _judge(self.difference, 0.0)

    @property
    def both(self) -> str:
        """``failed`` if a part failed, else ``open`` if a part is open, else ``passed``."""
        parts = (self.variance, self.algorithms)
        return next((state for state in (FAILED, OPEN) if state in parts), PASSED)


def judge(measured: pd.DataFrame, compared: pd.DataFrame) -> list[Verdict]:
    """Judges every task that was measured or compared, in the order of the tables.

    Args:
        measured: of ``variance.measure``.
        compared: of ``comparison.compare``.
    """
    return [_verdict(task, measured, compared) for task in dict.fromkeys([*measured["task"], *compared["task"]])]


def over_seeds(measured: pd.DataFrame, task: str, quantity: str) -> dict[str, Estimate]:
    """Returns critic -> mean over seeds with its interval; the name is empty for what needs no critic."""
    rows = measured[(measured["task"] == task) & (measured["quantity"] == quantity)]
    return {str(critic): t_interval(group["value"].to_numpy()) for critic, group in rows.groupby("critic", sort=False)}


def _verdict(task: str, measured: pd.DataFrame, compared: pd.DataFrame) -> Verdict:
    explained = over_seeds(measured, task, ALL)
    best = max(explained, key=lambda critic: explained[critic].value, default="")
    differences = compared[compared["task"] == task]["difference"].to_numpy()
    return Verdict(
        task=task,
        critic=best,
        explained=explained.get(best),
        difference=t_interval(differences) if differences.size else None,
        pairs=differences.size,
    )


def _judge(estimate: Estimate, least: float) -> str:
    if estimate.low != estimate.low:  # one seed has no interval
        return OPEN
    return PASSED if estimate.low > least else FAILED
