# SPDX-License-Identifier: Apache-2.0
"""Applies the stopping rule of a hypotheses file: which runs are needed next, and where each contrast stands.

The rule, fixed before the first run. Seeds are taken in the study's order. A seed counts for a contrast when all its
runs have ended, and gives a pair when all have finished. A contrast is closed at the first seed after which it has
``min_seeds`` pairs or more and its 95 % t interval has a half-width of at most its ``bound``; or when ``max_seeds``
have ended; or when the study has spent its budget. Its numbers are those of the seeds up to there, whatever other
contrasts add, so that neither the number of processes nor an interruption changes them. An arm that no contrast names
gets ``min_seeds`` seeds. The rule looks at widths, never at the sign or the significance of a difference.

Shapes: R pairs.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from verl_dvpo.bench.statistics import Estimate, t_interval
from verl_dvpo.bench.study.config import Study
from verl_dvpo.bench.study.hypotheses import Contrast, Hypotheses
from verl_dvpo.bench.study.plan import FINISHED, Run, plan, read_record
from verl_dvpo.records import read_metrics, scores

#: Name of a run -> how it ended; None if it has not.
Records = Mapping[str, Mapping[str, Any] | None]


class State(StrEnum):
    """Says why a contrast gets no further seed, or that it does."""

    OPEN = "open"
    NARROW = "narrow enough"
    MAX_SEEDS = "max seeds"
    BUDGET = "budget"


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Tells where a contrast stands.

    Attributes:
        contrast: the contrast.
        ended: number of seeds whose runs have all ended, in the study's order, up to the one that closed it.
        seeds: those of them that give a pair.
        treatment, control: (R,) measures, means over noises and tasks, paired by seed.
        state: why it is closed, or that it is open.
    """

    contrast: Contrast
    ended: int
    seeds: tuple[int, ...]
    treatment: tuple[float, ...]
    control: tuple[float, ...]
    state: State

    @property
    def differences(self) -> list[float]:
        """Returns treatment minus control, (R,)."""
        return [a - b for a, b in zip(self.treatment, self.control, strict=True)]

    @property
    def estimate(self) -> Estimate:
        """Returns the mean difference with its 95 % t interval; NaN without a pair."""
        return t_interval(self.differences) if self.seeds else Estimate(*[float("nan")] * 3)

    @property
    def half_width(self) -> float:
        """Half of the interval's width, in units of score; NaN without two pairs."""
        return (self.estimate.high - self.estimate.low) / 2.0


def records_of(study: Study) -> dict[str, Mapping[str, Any] | None]:
    """Reads how each run of a study ended."""
    return {run.name: read_record(run) for run in plan(study)}


def hours(records: Records) -> float:
    """Returns the hours of wall time of all runs that have ended."""
    return sum(float(record["wall_seconds"]) for record in records.values() if record is not None) / 3600.0


def standings(study: Study, records: Records) -> list[Standing]:
    """Returns where each contrast stands, in the order of the hypotheses file; none without hypotheses."""
    hypotheses = study.hypotheses
    if hypotheses is None:
        return []
    runs = _by_seed(plan(study))
    spent = _is_spent(hypotheses, records)
    return [_standing(contrast, hypotheses, runs, records, spent=spent) for contrast in hypotheses.contrasts]


def needed(study: Study, records: Records) -> list[Run]:
    """Returns the runs that have not ended and that the rule needs now, in the order of ``plan``; all without a rule.

    Runs beyond them may become needed when these have ended.
    """
    waiting = [run for run in plan(study) if records[run.name] is None]
    hypotheses = study.hypotheses
    if hypotheses is None:
        return waiting
    if _is_spent(hypotheses, records):
        return []
    least = hypotheses.stopping.min_seeds
    seeds_of = {run.arm: 0 if run.arm in hypotheses.arms else least for run in plan(study)}
    for standing in standings(study, records):
        if standing.state is State.OPEN:
            for arm in standing.contrast.arms:
                seeds_of[arm] = max(seeds_of[arm], least, standing.ended + 1)
    place = {seed: number for number, seed in enumerate(study.seeds)}
    return [run for run in waiting if place[run.seed] < seeds_of[run.arm]]


def measure(run: Run, record: Mapping[str, Any], last_validations: int) -> float:
    """Returns the mean in-domain score of a finished run's last validations."""
    if last_validations == 1:
        return float(record["score"])
    by_step: dict[int, dict[str, float]] = {}
    for line in read_metrics(run.metrics):
        by_step.setdefault(line["step"], {}).update(scores(line))
    validated = [by_step[step] for step in sorted(by_step) if by_step[step]]
    each = [sum(found[source] for source in run.task.in_domain) for found in validated[-last_validations:]]
    return sum(each) / len(each) / len(run.task.in_domain)


def _is_spent(hypotheses: Hypotheses, records: Records) -> bool:
    budget = hypotheses.stopping.budget_hours
    return budget is not None and hours(records) >= budget


def _by_seed(runs: Iterable[Run]) -> dict[int, dict[tuple[str, str, str], Run]]:
    found: dict[int, dict[tuple[str, str, str], Run]] = {}
    for run in runs:
        found.setdefault(run.seed, {})[run.arm] = run
    return found


def _standing(
    contrast: Contrast,
    hypotheses: Hypotheses,
    runs: Mapping[int, Mapping[tuple[str, str, str], Run]],
    records: Records,
    *,
    spent: bool,
) -> Standing:
    rule = hypotheses.stopping
    seeds: list[int] = []
    treatment: list[float] = []
    control: list[float] = []

    def standing(ended: int, state: State) -> Standing:
        return Standing(
            contrast=contrast,
            ended=ended,
            seeds=tuple(seeds),
            treatment=tuple(treatment),
            control=tuple(control),
            state=state,
        )

    for ended, (seed, arms) in enumerate(list(runs.items())[: rule.max_seeds], start=1):
        mine = {arm: (arms[arm], records[arms[arm].name]) for arm in contrast.arms}
        if any(record is None for _, record in mine.values()):
            return standing(ended - 1, State.BUDGET if spent else State.OPEN)
        finished = {
            arm: measure(run, record, contrast.last_validations)
            for arm, (run, record) in mine.items()
            if record is not None and record["status"] == FINISHED
        }
        if len(finished) == len(mine):
            seeds.append(seed)
            treatment.append(_mean(score for arm, score in sorted(finished.items()) if arm[0] == contrast.treatment))
            control.append(_mean(score for arm, score in sorted(finished.items()) if arm[0] == contrast.control))
        now = standing(ended, State.NARROW)
        if len(seeds) >= rule.min_seeds and now.half_width <= contrast.bound:
            return now
    return standing(rule.max_seeds, State.MAX_SEEDS)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
