# SPDX-License-Identifier: Apache-2.0
"""The typed side of a study's YAML; an impossible value is a ValueError that names the field, before anything starts.

    name: smoke
    out: runs/studies/smoke                 # folder of the study; relative to where the command runs
    base: [platform=cpu]                    # Hydra overrides of every run
    algorithms:                             # names of config/algorithm, or a variant of one
      - ppo
      - {name: dvpo_no_risk, algorithm: dvpo, overrides: [critic.value.coef.risk=0]}
    noises:                                 # names of config/noise, or one with its fields
      - none
      - {kind: flip, rate: 0.3}
    tasks:                                  # names of config/task, or one with overrides and its own data sources
      - {name: demo, in_domain: [demo_addition]}
    seeds: [0, 1, 2]
    steps: 60                               # of training, in every run
    test_freq: 20                           # steps between validations; the last step is always validated
    reference: ppo                          # what the others are compared with; the first algorithm by default
    minutes_per_run: null                   # a run that takes longer fails; null for no limit

Every run is one element of algorithms x noises x tasks x seeds.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
CLEAN = "none"


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """One choice on the axis of algorithms.

    Attributes:
        name: what the report calls it; letters, digits and ``_ . + -``.
        overrides: Hydra overrides that choose it.
    """

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Noise:
    """One corruption of the reward.

    Attributes:
        name, overrides: as for an algorithm.
        kind: of config/noise.
        rate: share in [0, 1] of corrupted rewards, 0 for none; None for a kind that has no rate.
    """

    name: str
    overrides: tuple[str, ...]
    kind: str
    rate: float | None


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained on.

    Attributes:
        name, overrides: as for an algorithm.
        in_domain: data sources of the validation that are of the trained domain; all others are out of it.
    """

    name: str
    overrides: tuple[str, ...]
    in_domain: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Study:
    """A whole study; see the module's documentation for the YAML that it comes from."""

    name: str
    out: Path
    base: tuple[str, ...]
    algorithms: tuple[Algorithm, ...]
    noises: tuple[Noise, ...]
    tasks: tuple[Task, ...]
    seeds: tuple[int, ...]
    steps: int
    test_freq: int
    reference: str
    minutes_per_run: float | None = None

    def __post_init__(self) -> None:
        _label("name", self.name)
        for field in ("steps", "test_freq"):
            if _whole(field, getattr(self, field)) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        for field in ("algorithms", "noises", "tasks", "seeds"):
            values = getattr(self, field)
            if not values:
                raise ValueError(f"{field} is empty: name at least one")
            names = [value if isinstance(value, int) else value.name for value in values]
            repeated = sorted({str(name) for name in names if names.count(name) > 1})
            if repeated:
                raise ValueError(f"{field} has {repeated} more than once; give variants a name of their own")
        for seed in self.seeds:
            if _whole("seeds", seed) < 0:
                raise ValueError(f"seeds must be at least 0, got {seed}")
        algorithms = [algorithm.name for algorithm in self.algorithms]
        if self.reference not in algorithms:
            raise ValueError(f"reference is {self.reference!r}; it must be one of {algorithms}")
        if self.minutes_per_run is not None and not self.minutes_per_run > 0:
            raise ValueError(f"minutes_per_run must be above 0 or null, got {self.minutes_per_run}")

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {**asdict(self), "out": str(self.out)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Study":
        """The study that `to_json` wrote."""
        return cls(
            **{
                **content,
                "out": Path(content["out"]),
                "base": tuple(content["base"]),
                "algorithms": tuple(Algorithm(**_tuples(each)) for each in content["algorithms"]),
                "noises": tuple(Noise(**_tuples(each)) for each in content["noises"]),
                "tasks": tuple(Task(**_tuples(each)) for each in content["tasks"]),
                "seeds": tuple(content["seeds"]),
            }
        )


def load_study(path: str | Path) -> Study:
    """Reads a study's YAML.

    Raises:
        ValueError: the file is missing or no mapping, or a field is unknown, missing or out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"the study {path} does not exist")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"the study {path} is no YAML: {error}") from error
    try:
        return parse_study(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_study(content: Any) -> Study:
    """The study that a YAML's `content` describes; raises ValueError as `load_study` does."""
    if not isinstance(content, Mapping):
        raise ValueError(f"a study is a mapping of fields, got {type(content).__name__}")
    optional: dict[str, Any] = {"base": [], "reference": None, "minutes_per_run": None}
    known = {field.name for field in fields(Study)}
    _only("the study", content, known)
    missing = sorted(known - optional.keys() - content.keys())
    if missing:
        raise ValueError(f"the study lacks {missing}")
    given = {**optional, **content}
    algorithms = tuple(_algorithm(each) for each in _list("algorithms", given["algorithms"]))
    return Study(
        name=given["name"],
        out=Path(str(given["out"])).expanduser(),
        base=_strings("base", given["base"]),
        algorithms=algorithms,
        noises=tuple(_noise(each) for each in _list("noises", given["noises"])),
        tasks=tuple(_task(each) for each in _list("tasks", given["tasks"])),
        seeds=tuple(_whole("seeds", seed) for seed in _list("seeds", given["seeds"])),
        steps=given["steps"],
        test_freq=given["test_freq"],
        reference=given["reference"] or (algorithms[0].name if algorithms else ""),
        minutes_per_run=given["minutes_per_run"],
    )


def _algorithm(value: Any) -> Algorithm:
    given = {"name": value, "algorithm": value} if isinstance(value, str) else _mapping("algorithms", value)
    _only("algorithms", given, {"name", "algorithm", "overrides"})
    base = _label("algorithms: algorithm", given.get("algorithm", given.get("name")))
    overrides = _strings("algorithms: overrides", given.get("overrides", []))
    return Algorithm(name=_label("algorithms", given.get("name", base)), overrides=(f"algorithm={base}", *overrides))


def _noise(value: Any) -> Noise:
    given = {"kind": value} if isinstance(value, str) else dict(_mapping("noises", value))
    kind = _label("noises: kind", given.pop("kind", None))
    name = given.pop("name", None)
    rate = given.get("rate", 0.0 if kind == CLEAN else None)
    if rate is not None:
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0.0 <= rate <= 1.0 or math.isnan(rate):
            raise ValueError(f"noises: rate must be in [0, 1], got {rate!r} for {kind!r}")
        rate = float(rate)
    if "seed" in given:
        raise ValueError("noises: seed is the run's own and cannot be set")
    label = _label("noises", name or (kind if "rate" not in given else f"{kind}_{rate:g}"))
    settings = tuple(f"noise.{field}={setting}" for field, setting in given.items())
    return Noise(name=label, overrides=(f"noise={kind}", *settings), kind=kind, rate=rate)


def _task(value: Any) -> Task:
    given = {"name": value} if isinstance(value, str) else _mapping("tasks", value)
    _only("tasks", given, {"name", "task", "overrides", "in_domain"})
    base = _label("tasks: task", given.get("task", given.get("name")))
    name = _label("tasks", given.get("name", base))
    return Task(
        name=name,
        overrides=(f"+task={base}", *_strings("tasks: overrides", given.get("overrides", []))),
        in_domain=_strings("tasks: in_domain", given.get("in_domain", [base])),
    )


def _tuples(content: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}


def _mapping(field: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{field}: an entry is a name or a mapping, got {value!r}")
    return value


def _only(field: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    unknown = sorted(str(name) for name in given if name not in known)
    if unknown:
        raise ValueError(f"{field}: unknown {unknown}; allowed are {sorted(known)}")


def _list(field: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{field} must be a list, got {value!r}")
    return value


def _strings(field: str, value: Any) -> tuple[str, ...]:
    if not all(isinstance(each, str) for each in _list(field, value)):
        raise ValueError(f"{field} must be a list of strings, got {value!r}")
    return tuple(value)


def _label(field: str, value: Any) -> str:
    if not isinstance(value, str) or not _LABEL.fullmatch(value):
        raise ValueError(f"{field}: {value!r} is no name; letters, digits and _ . + - are allowed")
    return value


def _whole(field: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{field} must be an integer, got {value!r}")
    return value
