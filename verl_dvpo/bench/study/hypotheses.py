# SPDX-License-Identifier: Apache-2.0
"""Defines the fields of a hypotheses file: what a study expects, and when it stops, written before its first run.

    stopping:
      min_seeds: 5                # pairs of runs that every contrast gets
      max_seeds: 15               # seeds that a contrast may use, of the study's own, in their order
      budget_hours: 48            # of all runs together, wall time; null: no limit
    verdict:
      by: interval_and_test       # or interval
      alpha: 0.05                 # of the test, after Holm's correction over the primary contrasts
    contrasts:
      - name: weighted_over_ppo
        sentence: The weighted form scores above PPO where noise depends on the prompt.
        primary: true
        treatment: dvpo_weighted  # names from the study's axes
        control: ppo
        noises: [heavy_prompt]    # over several noises and tasks the scores of a seed are averaged first
        tasks: [arithmetic]
        direction: higher         # of the treatment against the control
        expected: 0.05            # size of the difference, treatment minus control; null: no size is expected
        last_validations: 1       # the measure: mean score of so many last validations; 1: the final score
        bound: 0.02               # half-width of the 95 % t interval at which seeds stop being added

``verl_dvpo.bench.study.stopping`` applies the rule, ``verl_dvpo.bench.study.contrasts`` the verdict.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictInt, StrictStr, ValidationError, ValidationInfo, field_validator

from verl_dvpo.bench.settings import explain
from verl_dvpo.bench.study.fields import Label, Names, Settings, check_mapping, read_yaml

Positive = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]


class Stopping(Settings):
    """Says when no further seed is added; ``verl_dvpo.bench.study.stopping`` has the rule.

    Attributes:
        min_seeds: pairs of runs, at least 3, before the width of an interval counts. Few make the rule optimistic:
            see docs/studies.md.
        max_seeds: seeds that a contrast may use, at least ``min_seeds``.
        budget_hours: hours of wall time of all runs together, failed ones included, after which no run starts; None:
            no limit.
    """

    min_seeds: StrictInt = Field(ge=3)
    max_seeds: StrictInt
    budget_hours: Positive | None = None

    @field_validator("max_seeds")
    @classmethod
    def _enough(cls, most: int, info: ValidationInfo) -> int:
        least = info.data.get("min_seeds", most)
        if most < least:
            raise ValueError(f"an integer of at least min_seeds={least} is allowed; raise it")
        return most


class Verdict(Settings):
    """Says when a contrast counts as decided.

    Attributes:
        by: ``interval``: its 95 % t interval lies on one side of 0. ``interval_and_test``: moreover the exact
            sign-flip test's p-value is at most ``alpha``, for primary contrasts after Holm's correction.
        alpha: level of the test, in (0, 0.5].
    """

    by: Literal["interval", "interval_and_test"] = "interval_and_test"
    alpha: float = Field(default=0.05, gt=0, le=0.5, strict=True)


class Contrast(Settings):
    """Compares two algorithms by paired seeds, with an expectation; the documentation of this module shows its YAML.

    Attributes:
        name: unique in the file.
        sentence: what is expected, in words.
        primary: whether it counts for Holm's correction; the others are exploratory.
        treatment, control: names of algorithms of the study.
        noises, tasks: names; the scores of a seed are averaged over them.
        direction: whether ``treatment`` is expected ``higher`` or ``lower`` than ``control``.
        expected: difference in score that is expected, of the sign of ``direction``; None: no size.
        last_validations: the measure is the mean of the in-domain scores of so many last validations.
        bound: half-width of the t interval, in units of score, at which seeds stop being added.
    """

    name: Label
    sentence: StrictStr = Field(min_length=1)
    primary: StrictBool
    treatment: Label
    control: Label
    noises: Names = Field(min_length=1)
    tasks: Names = Field(min_length=1)
    direction: Literal["higher", "lower"]
    expected: float | None = Field(default=None, strict=True, allow_inf_nan=False)
    last_validations: StrictInt = Field(default=1, ge=1)
    bound: Positive

    @field_validator("control")
    @classmethod
    def _another(cls, control: str, info: ValidationInfo) -> str:
        if control == info.data.get("treatment"):
            raise ValueError("another algorithm than the treatment is allowed; choose one")
        return control

    @field_validator("expected")
    @classmethod
    def _of_the_direction(cls, expected: float | None, info: ValidationInfo) -> float | None:
        direction = info.data.get("direction")
        if expected is not None and not (expected > 0 if direction == "higher" else expected < 0):
            sign = "above" if direction == "higher" else "below"
            raise ValueError(f"a number {sign} 0 is allowed with direction={direction}; correct one of them")
        return expected

    @property
    def arms(self) -> frozenset[tuple[str, str, str]]:
        """Returns the arms (algorithm, noise, task) that it compares."""
        cells = [(noise, task) for noise in self.noises for task in self.tasks]
        return frozenset((algorithm, *cell) for algorithm in (self.treatment, self.control) for cell in cells)


class Hypotheses(Settings):
    """Holds a whole hypotheses file; the documentation of this module shows its YAML.

    Attributes:
        file: where it was read; None for a mapping.
    """

    stopping: Stopping
    verdict: Verdict = Verdict()
    contrasts: tuple[Contrast, ...] = Field(min_length=1)
    file: Path | None = None

    @field_validator("contrasts")
    @classmethod
    def _distinct(cls, contrasts: tuple[Contrast, ...]) -> tuple[Contrast, ...]:
        names = [contrast.name for contrast in contrasts]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"each may stand once, but {repeated} are repeated; rename one")
        return contrasts

    @property
    def primary(self) -> tuple[Contrast, ...]:
        """Returns the primary contrasts."""
        return tuple(contrast for contrast in self.contrasts if contrast.primary)

    @property
    def arms(self) -> frozenset[tuple[str, str, str]]:
        """Returns the arms that any contrast compares."""
        return frozenset().union(*(contrast.arms for contrast in self.contrasts))


def read_hypotheses(path: Path) -> dict[str, Any]:
    """Returns the content of a hypotheses file with its place, checked.

    Raises:
        ValueError: the file is missing or no YAML mapping, a field is unknown, missing or out of range, or no number
            of seeds could ever satisfy the verdict.
    """
    content = check_mapping(read_yaml(path, "hypotheses"), "hypotheses")
    try:
        hypotheses = Hypotheses.model_validate({**content, "file": path})
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error, Hypotheses)}") from error
    try:
        check_attainable(hypotheses)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return hypotheses.model_dump(mode="json")


def check_attainable(hypotheses: Hypotheses) -> None:
    """Raises ValueError if the test cannot reach ``alpha``: the least p-value of R pairs is 2 / 2^R."""
    number = max(1, len(hypotheses.primary))
    most, alpha = hypotheses.stopping.max_seeds, hypotheses.verdict.alpha
    if hypotheses.verdict.by == "interval_and_test" and number * 2.0 / 2**most > alpha:
        enough = next(seeds for seeds in range(most, 100) if number * 2.0 / 2**seeds <= alpha)
        raise ValueError(
            f"stopping.max_seeds is {most}; at least {enough} are required by verdict.alpha={alpha:g} with {number} "
            "primary contrasts, because the exact test has no smaller p-value; raise it, or set verdict.by=interval"
        )
