# SPDX-License-Identifier: Apache-2.0
"""Defines the fields of a study's YAML; an impossible value is a ValueError that names the field.

    name: smoke
    out: runs/studies/smoke                 # folder of the study; relative to where the command runs
    base: [platform=cpu]                    # Hydra overrides of every run
    algorithms:                             # names from config/algorithm, or variants with a name of their own
      - ppo
      - {name: dvpo_no_risk, algorithm: dvpo, overrides: [critic.value.coef.risk=0]}
    noises:                                 # names from config/noise, or a kind with its fields
      - none
      - {kind: flip, rate: 0.3}
    tasks:                                  # names from config/task, or one with overrides and its own data sources
      - {name: demo, in_domain: [demo_addition]}
    seeds: [0, 1, 2]
    steps: 60                               # of training, in every run
    test_freq: 20                           # steps between validations; the last step is always validated
    reference: ppo                          # the algorithm that the report compares with; default: the first
    minutes_per_run: null                   # a run that takes longer fails; null: no limit
    hypotheses: smoke.hypotheses.yaml       # beside this file; null: all seeds are run, nothing is pre-registered
    arms:                                   # parts of the matrix that are run; an axis that is left out is whole
      - {algorithms: [ppo], noises: [none]}
    tuning:                                 # what was tried to set each algorithm, for the report
      ppo: {settings: 6, how: actor.optim.lr in six steps, one seed of its own, clean rewards}
    same_head: false                        # true: critics with heads of different width are refused; else reported

Every run is one element of algorithms x noises x tasks x seeds. By default all of them are run, or with hypotheses
those that a contrast names.
"""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from verl_dvpo.bench.settings import explain
from verl_dvpo.bench.study.fields import Label, Names, Settings, ShareOrNone, check_mapping, read_yaml
from verl_dvpo.bench.study.hypotheses import Hypotheses, check_attainable, read_hypotheses

CLEAN = "none"


class _Choice(Settings):
    """Reads an entry of one axis, which in YAML is a name or a mapping of fields."""

    @classmethod
    def _fields(cls, value: Any, key: str) -> dict[str, Any]:
        given = {key: value} if isinstance(value, str) else value
        if not isinstance(given, Mapping):
            raise ValueError("a name or a mapping of fields is allowed; write one of them")
        return dict(given)


class Algorithm(_Choice):
    """One choice on the axis of algorithms.

    Attributes:
        name: its name in the report; letters, digits and ``_ . + -``.
        algorithm: its name in config/algorithm; default: ``name``.
        overrides: further Hydra overrides.
    """

    name: Label
    algorithm: Label
    overrides: tuple[StrictStr, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, value: Any) -> dict[str, Any]:
        given = cls._fields(value, "name")
        return {**_same(given, "name", "algorithm"), **given}

    @property
    def selection(self) -> tuple[str, ...]:
        """Hydra overrides that select it."""
        return (f"algorithm={self.algorithm}", *self.overrides)


class Noise(_Choice):
    """One corruption of the reward.

    Attributes:
        name: its name in the report; default: ``<kind>`` or ``<kind>_<rate>``.
        kind: its name in config/noise.
        rate: share in [0, 1] of corrupted rewards, 0 for none; None for a kind that has no rate.
        settings: fields of the noise as given, rate included. In YAML they stand beside ``kind``.
    """

    kind: Label
    rate: ShareOrNone
    settings: dict[StrictStr, Any]
    name: Label

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, value: Any) -> dict[str, Any]:
        given = cls._fields(value, "kind")
        own = {field: given.pop(field) for field in ("kind", "name") if given.get(field) is not None}
        if "settings" in given:  # as `Study.to_json` writes it
            return {**own, **given}
        if "seed" in given:
            raise ValueError("the seed of a noise is the run's own; remove seed")
        kind, rate = own.get("kind"), given.get("rate")
        if "rate" in given and rate is None:
            raise ValueError("a rate is a number in [0, 1]; correct or remove it")
        label = {} if kind is None else {"name": f"{kind}_{rate:g}" if isinstance(rate, (int, float)) else kind}
        rate = 0.0 if rate is None and kind == CLEAN else rate
        return {**label, **own, "rate": rate, "settings": given}

    @property
    def selection(self) -> tuple[str, ...]:
        """Hydra overrides that select it."""
        return (f"noise={self.kind}", *(f"noise.{field}={setting}" for field, setting in self.settings.items()))


class Task(_Choice):
    """A task that runs train on.

    Attributes:
        name: its name in the report; letters, digits and ``_ . + -``.
        task: its name in config/task; default: ``name``.
        overrides: further Hydra overrides.
        in_domain: data sources of the validation that belong to the trained domain; default: ``task``. All other
            sources count as out of the domain.
    """

    name: Label
    task: Label
    overrides: tuple[StrictStr, ...] = ()
    in_domain: tuple[StrictStr, ...]

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, value: Any) -> dict[str, Any]:
        given = cls._fields(value, "name")
        both = {**_same(given, "name", "task"), **given}
        return {"in_domain": [both["task"]] if "task" in both else [], **both}

    @property
    def selection(self) -> tuple[str, ...]:
        """Hydra overrides that select it."""
        return (f"+task={self.task}", *self.overrides)


class Arms(Settings):
    """A part of the matrix: every algorithm with every noise on every task; an empty axis stands for the whole one."""

    algorithms: Names = ()
    noises: Names = ()
    tasks: Names = ()


class Tuning(Settings):
    """The tuning that an algorithm had before the study.

    Attributes:
        settings: number of settings that were tried, 1 or more; 1 is an algorithm as it ships.
        how: what was varied, on which seeds and task, and what chose.
    """

    settings: StrictInt = Field(ge=1)
    how: StrictStr = Field(min_length=1)


def _read(value: Any) -> Any:
    """Returns the content of the hypotheses file that a study names."""
    return read_hypotheses(Path(value).expanduser().absolute()) if isinstance(value, (str, Path)) else value


class Study(Settings):
    """A whole study; the documentation of this module shows its YAML."""

    name: Label
    out: Annotated[Path, BeforeValidator(lambda value: Path(str(value)).expanduser())]
    base: tuple[StrictStr, ...] = ()
    algorithms: tuple[Algorithm, ...] = Field(min_length=1)
    noises: tuple[Noise, ...] = Field(min_length=1)
    tasks: tuple[Task, ...] = Field(min_length=1)
    seeds: tuple[Annotated[StrictInt, Field(ge=0)], ...] = Field(min_length=1)
    steps: StrictInt = Field(ge=1)
    test_freq: StrictInt = Field(ge=1)
    reference: StrictStr = Field(default="", validate_default=True)
    minutes_per_run: float | None = Field(default=None, gt=0, strict=True, allow_inf_nan=False)
    hypotheses: Annotated[Hypotheses | None, BeforeValidator(_read)] = None
    arms: tuple[Arms, ...] = ()
    tuning: dict[Label, Tuning] = Field(default_factory=dict)
    same_head: StrictBool = False

    @field_validator("algorithms", "noises", "tasks", "seeds")
    @classmethod
    def _distinct(cls, entries: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [str(entry if isinstance(entry, int) else entry.name) for entry in entries]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"each may stand once, but {repeated} are repeated; give variants a name of their own")
        return entries

    @field_validator("reference", mode="before")
    @classmethod
    def _known(cls, value: Any, info: ValidationInfo) -> Any:
        names = [algorithm.name for algorithm in info.data.get("algorithms", ())]
        if names and value and value not in names:
            raise ValueError(f"allowed are {', '.join(names)}; choose one of them")
        return value or (names[0] if names else "")

    def to_json(self) -> dict[str, Any]:
        """Returns the content that ``parse_study`` reads back."""
        return self.model_dump(mode="json")

    def changed(self, **fields: Any) -> "Study":
        """Returns the study with other values in some fields; raises ValueError as ``parse_study`` does."""
        return parse_study({**self.to_json(), **fields})


def load_study(path: str | Path) -> Study:
    """Reads a study's YAML.

    Raises:
        ValueError: the file is missing or no mapping, or a field is unknown, missing or out of range.
    """
    path = Path(path)
    content = read_yaml(path, "study")
    if isinstance(content, Mapping) and isinstance(content.get("hypotheses"), str):
        content = {**content, "hypotheses": path.parent / Path(content["hypotheses"]).expanduser()}
    try:
        return parse_study(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_study(content: Any) -> Study:
    """Returns the study that the content of a YAML describes; raises ValueError as ``load_study`` does."""
    try:
        study = Study.model_validate(dict(check_mapping(content, "study")))
    except ValidationError as error:
        raise ValueError(explain(error, Study)) from error
    _check_names(study)
    if study.hypotheses is not None:
        check_attainable(study.hypotheses)
        _check_hypotheses(study, study.hypotheses)
    return study


def _check_names(study: Study) -> None:
    """Raises ValueError where ``arms`` or ``tuning`` names what no axis has."""
    axes = _axes(study)
    for place, arms in enumerate(study.arms):
        for axis, known in axes.items():
            for name in getattr(arms, axis):
                _check_known(f"arms[{place}].{axis}", name, known)
    for name in study.tuning:
        _check_known("tuning", name, axes["algorithms"])


def _check_hypotheses(study: Study, hypotheses: Hypotheses) -> None:
    """Raises ValueError where a contrast names what no axis or arm has, or seeds are too few."""
    axes = _axes(study)
    for place, contrast in enumerate(hypotheses.contrasts):
        field = f"hypotheses.contrasts[{place}]"
        for role in ("treatment", "control"):
            _check_known(f"{field}.{role}", getattr(contrast, role), axes["algorithms"])
        for axis in ("noises", "tasks"):
            for name in getattr(contrast, axis):
                _check_known(f"{field}.{axis}", name, axes[axis])
        validations = math.ceil(study.steps / study.test_freq)  # the one before training is none of them
        if contrast.last_validations > validations:
            raise ValueError(
                f"{field}.last_validations is {contrast.last_validations}; at most {validations} are allowed with "
                f"steps={study.steps} and test_freq={study.test_freq}; lower it or test_freq"
            )
        left_out = sorted(contrast.arms - arms_of(study))
        if left_out:
            raise ValueError(
                f"arms is without {', '.join('/'.join(arm) for arm in left_out)}; every arm of a contrast is required, "
                f"{contrast.name} needs them; add them, or remove arms"
            )
    most = hypotheses.stopping.max_seeds
    if len(study.seeds) < most:
        raise ValueError(
            f"seeds is {list(study.seeds)}; at least {most} are required by hypotheses.stopping.max_seeds; add some"
        )


def _check_known(field: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ValueError(f"{field} is {name!r}; allowed are {', '.join(known)}; choose one of them")


def _axes(study: Study) -> dict[str, tuple[str, ...]]:
    return {axis: tuple(each.name for each in getattr(study, axis)) for axis in ("algorithms", "noises", "tasks")}


def arms_of(study: Study) -> frozenset[tuple[str, str, str]]:
    """Returns the arms (algorithm, noise, task) that are run: ``arms``, else those of the contrasts, else all."""
    if not study.arms and study.hypotheses is not None:
        return study.hypotheses.arms
    axes = _axes(study)
    parts = [[getattr(arms, axis) or whole for axis, whole in axes.items()] for arms in study.arms or (Arms(),)]
    return frozenset(arm for part in parts for arm in itertools.product(*part))


def _same(given: Mapping[str, Any], first: str, second: str) -> dict[str, Any]:
    """Returns both fields; the one that is not given takes the value of the other."""
    value = given.get(second, given.get(first))
    return {} if value is None else {first: value, second: value}
